//! Conversions lose nothing, and refuse what must not come in.

use duet_core::work::*;
use duet_core::{
    ArtifactRef, Attempt, Digest, Millis, PolicyVersion, Rank, Seed, TrainerEpoch, TreeId,
};
use duet_proto::convert::{MAX_COMPONENTS, MAX_LEAVES, MAX_REASON, MAX_TEXT, Sender, clip_reason};
use duet_proto::{DecodeError, v1 as wire};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use prost::Message;

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn number() -> impl Strategy<Value = f64> {
    use proptest::num::f64::{NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
    NEGATIVE | POSITIVE | NORMAL | SUBNORMAL | ZERO
}

fn artifact() -> impl Strategy<Value = ArtifactRef> {
    ("[a-z0-9/.-]{1,40}", digest(), any::<u64>()).prop_map(|(key, digest, bytes)| ArtifactRef {
        key,
        digest,
        bytes,
    })
}

prop_compose! {
    fn weights()(
        version in any::<u64>(), llm in option::of(artifact()), dit in option::of(artifact()),
        digest in digest(),
    ) -> Weights {
        Weights { version: PolicyVersion(version), llm, dit, digest }
    }
}

prop_compose! {
    fn prompt()(row in any::<u64>(), text in ".{0,30}", meta in ".{0,30}") -> PromptRow {
        PromptRow { row, text, meta }
    }
}

fn tree() -> impl Strategy<Value = TreeId> {
    any::<(u32, u32)>().prop_map(|(iteration, index)| TreeId { iteration, index })
}

fn lease_id() -> impl Strategy<Value = LeaseId> {
    (tree(), any::<u32>(), 1..u32::MAX, 0..3u8).prop_map(|(tree, trace, attempt, stage)| {
        let unit = match stage {
            0 => Unit::Think(tree),
            1 => Unit::Render(tree.subtree(trace)),
            _ => Unit::Score(tree.subtree(trace)),
        };
        LeaseId { unit, attempt: Attempt(attempt) }
    })
}

fn window() -> impl Strategy<Value = Window> {
    (0..1000u32, 0..1000u32).prop_map(|(start, len)| Window { start, len })
}

fn seed() -> impl Strategy<Value = Seed> {
    any::<[u8; 32]>().prop_map(Seed)
}

prop_compose! {
    fn lease()(
        id in lease_id(), expires in any::<u64>(), weights in weights(), prompt in prompt(),
        artifact in artifact(), count in 1..64u32, window in window(), seed in seed(),
        refined_prompt in ".{0,30}",
    ) -> Lease {
        let work = match id.unit {
            Unit::Think(_) => Work::Think(ThinkWork { weights, prompt, traces: count, seed }),
            Unit::Render(_) => {
                Work::Render(RenderWork { weights, trace: artifact, leaves: count, window, seed })
            }
            Unit::Score(_) => {
                Work::Score(ScoreWork { prompt, refined_prompt, render: artifact, leaves: count })
            }
        };
        Lease { id, expires_in: Millis(expires), work }
    }
}

prop_compose! {
    fn train_trace()(
        trace in any::<u32>(), artifact in artifact(), advantage in option::of(number()),
        render in option::of(artifact()), leaf_advantages in vec(option::of(number()), 0..4),
    ) -> TrainTrace {
        TrainTrace { trace, artifact, advantage, render, leaf_advantages }
    }
}

prop_compose! {
    fn train_tree()(
        id in tree(), prompt in prompt(), traces in vec(train_trace(), 0..3),
    ) -> TrainTree {
        TrainTree { id, prompt, traces }
    }
}

prop_compose! {
    fn step()(
        epoch in any::<u64>(), iteration in any::<u32>(), llm in number(), dit in number(),
        window in window(), trees in vec(train_tree(), 0..3),
        (update, publish, checkpoint) in any::<(bool, bool, bool)>(),
    ) -> Step {
        let (epoch, gates) = (TrainerEpoch(epoch), Gates { llm, dit });
        Step { epoch, iteration, gates, window, trees, update, publish, checkpoint }
    }
}

prop_compose! {
    fn rendezvous()(
        epoch in any::<u64>(), rank in 0..8u32, more in 1..8u32,
        store in option::of("[a-z0-9.:]{1,20}"), restore in option::of(artifact()),
        newest in option::of((any::<u64>(), digest())),
    ) -> Rendezvous {
        let (epoch, world) = (TrainerEpoch(epoch), rank + more);
        let held = |(version, digest)| Held { version: PolicyVersion(version), digest };
        let newest = newest.map(held);
        Rendezvous { epoch, rank: Rank(rank), world, store, restore, newest }
    }
}

fn assignment() -> impl Strategy<Value = Assignment> {
    prop_oneof![
        lease().prop_map(Assignment::Lease),
        weights().prop_map(Assignment::Publish),
        rendezvous().prop_map(Assignment::Rendezvous),
        step().prop_map(Assignment::Step),
        ".{0,30}".prop_map(|reason| Assignment::Leave { reason }),
    ]
}

prop_compose! {
    fn trace()(
        artifact in artifact(), text in ".{0,30}", refined_prompt in ".{0,30}",
        well_formed in any::<bool>(), tokens in any::<u32>(), stopped in any::<bool>(),
    ) -> Trace {
        let finish = if stopped { Finish::Stop } else { Finish::Length };
        Trace { artifact, text, refined_prompt, well_formed, tokens, finish }
    }
}

fn score() -> impl Strategy<Value = Score> {
    prop_oneof![
        number().prop_map(Score::Scored),
        ".{0,30}".prop_map(Score::Failed),
        any::<u64>().prop_map(|after| Score::TimedOut(Millis(after))),
    ]
}

prop_compose! {
    fn outcome(unit: Unit)(
        traces in vec(trace(), 0..3), artifact in artifact(), took in any::<u64>(),
        scores in vec(btree_map("[a-z]{1,8}", score(), 0..4), 0..3),
        kind in "[a-z-]{1,10}", reason in ".{0,30}", which in 0..3u8,
    ) -> Outcome {
        let result = match unit {
            Unit::Think(_) => Done::Think(traces),
            Unit::Render(_) => Done::Render(artifact),
            Unit::Score(_) => Done::Score(scores),
        };
        match which {
            0 => Outcome::Done { result, took: Millis(took) },
            1 => Outcome::Failed { kind, reason },
            _ => Outcome::HandedBack,
        }
    }
}

prop_compose! {
    fn step_done()(
        epoch in any::<u64>(), rank in any::<u32>(), iteration in any::<u32>(),
        weights in weights(),
        metrics in btree_map("[a-z/_]{1,12}", number(), 0..5),
    ) -> StepDone {
        let (epoch, rank) = (TrainerEpoch(epoch), Rank(rank));
        StepDone { epoch, rank, iteration, weights, metrics }
    }
}

fn report() -> impl Strategy<Value = Report> {
    let lease = lease_id().prop_flat_map(|id| {
        outcome(id.unit).prop_map(move |outcome| Report::Lease { id, outcome })
    });
    let version = || any::<u64>().prop_map(PolicyVersion);
    let epoch = || any::<u64>().prop_map(TrainerEpoch);
    let rank = || any::<u32>().prop_map(Rank);
    prop_oneof![
        lease,
        version().prop_map(|version| Report::PublishAck { version }),
        (version(), ".{0,30}")
            .prop_map(|(version, reason)| Report::PublishFailed { version, reason }),
        (epoch(), "[a-z:0-9]{1,20}")
            .prop_map(|(epoch, address)| Report::StoreReady { epoch, address }),
        (epoch(), rank(), version(), digest()).prop_map(|(epoch, rank, version, digest)| {
            Report::TrainerReady { epoch, rank, version, digest }
        }),
        step_done().prop_map(Report::StepDone),
        (epoch(), rank(), version(), vec(artifact(), 0..3)).prop_map(
            |(epoch, rank, version, shards)| {
                Report::ShardDone(ShardDone { epoch, rank, version, shards })
            }
        ),
        (epoch(), rank(), "[a-z-]{1,10}", ".{0,30}").prop_map(|(epoch, rank, kind, reason)| {
            Report::TrainerFailed { epoch, rank, kind, reason }
        }),
    ]
}

proptest! {
    #[test]
    fn assignments_survive_the_wire(assignment in assignment()) {
        let bytes = wire::Assignment::from(&assignment).encode_to_vec();
        let back = Assignment::try_from(wire::Assignment::decode(bytes.as_slice()).unwrap());
        prop_assert_eq!(back.unwrap(), assignment);
    }

    #[test]
    fn reports_survive_the_wire(report in report()) {
        let bytes = wire::Report::from(&report).encode_to_vec();
        let back = Report::try_from(wire::Report::decode(bytes.as_slice()).unwrap());
        prop_assert_eq!(back.unwrap(), report);
    }

    #[test]
    fn whatever_decodes_is_taken_or_refused_without_a_panic(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(report) = wire::Report::decode(bytes.as_slice()) {
            let _ = Report::try_from(report);
        }
        if let Ok(assignment) = wire::Assignment::decode(bytes.as_slice()) {
            let _ = Assignment::try_from(assignment);
        }
    }

    #[test]
    fn reasons_are_cut_at_a_character(reason in "[a-zä€😀]{0,4000}") {
        let cut = clip_reason(&reason);
        prop_assert!(reason.starts_with(&cut) && cut.len() <= MAX_REASON);
        prop_assert!(cut == reason || cut.len() > MAX_REASON - 4);
    }
}

fn score_report(scores: Vec<wire::Score>) -> wire::Report {
    let id = LeaseId { unit: Unit::Score(TreeId::default().subtree(0)), attempt: Attempt(1) };
    let leaves = vec![wire::LeafScores { scores }];
    let result = Some(wire::done::Result::Scores(wire::Scores { leaves }));
    let outcome = wire::lease_report::Outcome::Done(wire::Done { took_ms: 1, result });
    let report = wire::LeaseReport { id: Some(id.into()), outcome: Some(outcome) };
    wire::Report { kind: Some(wire::report::Kind::Lease(report)) }
}

fn scored(component: &str, value: f64) -> wire::Score {
    let outcome = Some(wire::score::Outcome::Scored(value));
    wire::Score { component: component.to_owned(), outcome }
}

fn refusal(report: wire::Report) -> DecodeError {
    Report::try_from(report).expect_err("must be refused")
}

#[test]
fn a_score_must_be_finite_and_stand_once() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = refusal(score_report(vec![scored("semantic", value)]));
        assert_eq!(error, DecodeError::NonFinite("score.scored"));
    }
    let twice = refusal(score_report(vec![scored("a", 1.0), scored("a", 2.0)]));
    assert_eq!(twice, DecodeError::Twice { field: "leaf.scores", name: "a".to_owned() });
    let nothing = wire::Score { component: "a".to_owned(), outcome: None };
    assert_eq!(refusal(score_report(vec![nothing])), DecodeError::Missing("score.outcome"));
    let many = (0..=MAX_COMPONENTS).map(|i| scored(&i.to_string(), 0.0)).collect();
    assert!(matches!(refusal(score_report(many)), DecodeError::TooMany { .. }));
}

#[test]
fn a_result_of_another_stage_is_refused() {
    let mut report = score_report(Vec::new());
    let Some(wire::report::Kind::Lease(lease)) = &mut report.kind else { unreachable!() };
    let id = LeaseId { unit: Unit::Think(TreeId::default()), attempt: Attempt(1) };
    lease.id = Some(id.into());
    assert!(matches!(refusal(report), DecodeError::Contradiction { field: "done.result", .. }));
}

#[test]
fn digests_have_thirty_two_bytes() {
    for length in [0, 31, 33] {
        let artifact = wire::ArtifactRef { key: "a".into(), digest: vec![0; length], bytes: 1 };
        let error = ArtifactRef::try_from(artifact).expect_err("must be refused");
        assert_eq!(error, DecodeError::NotThirtyTwo { field: "artifact.digest", length });
    }
}

#[test]
fn lease_names_are_whole() {
    let tree = Some(TreeId::default().into());
    let id = |trace, stage: wire::Stage, attempt| wire::LeaseId {
        tree,
        trace,
        stage: stage.into(),
        attempt,
    };
    assert!(LeaseId::try_from(id(None, wire::Stage::Think, 1)).is_ok());
    for bad in [
        id(Some(0), wire::Stage::Think, 1),
        id(None, wire::Stage::Render, 1),
        id(None, wire::Stage::Score, 1),
        id(Some(0), wire::Stage::Unspecified, 1),
        id(Some(0), wire::Stage::Render, 0),
        wire::LeaseId { tree: None, ..id(None, wire::Stage::Think, 1) },
    ] {
        assert!(LeaseId::try_from(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn bounds_hold() {
    let long = wire::PromptRow { row: 0, text: "x".repeat(MAX_TEXT + 1), meta: String::new() };
    assert!(matches!(PromptRow::try_from(long), Err(DecodeError::TooLong { .. })));
    let beyond = wire::Window { start: u32::MAX, len: 1 };
    assert!(matches!(Window::try_from(beyond), Err(DecodeError::Contradiction { .. })));
    let artifact = ArtifactRef { key: "a".into(), digest: Digest([0; 32]), bytes: 0 };
    let work = wire::ScoreWork {
        prompt: Some(wire::PromptRow::default()),
        refined_prompt: String::new(),
        render: Some((&artifact).into()),
        leaves: MAX_LEAVES as u32 + 1,
    };
    assert!(matches!(ScoreWork::try_from(work.clone()), Err(DecodeError::TooMany { .. })));
    assert!(ScoreWork::try_from(wire::ScoreWork { leaves: 0, ..work }).is_err());
    let outside = wire::Rendezvous { rank: 2, world: 2, ..Default::default() };
    assert!(matches!(Rendezvous::try_from(outside), Err(DecodeError::Contradiction { .. })));
}

#[test]
fn worker_names_are_plain() {
    let caller =
        |name: &str| Some(wire::Caller { worker_id: name.to_owned(), session: 1, generation: 0 });
    assert_eq!(Sender::try_from(caller("rollout-0.a_B")).unwrap().worker, "rollout-0.a_B".into());
    let long = "x".repeat(129);
    for bad in ["", "a b", "a/b", "ä", "a\n", long.as_str()] {
        assert!(Sender::try_from(caller(bad)).is_err(), "{bad:?}");
    }
    assert_eq!(Sender::try_from(None).unwrap_err(), DecodeError::Missing("caller"));
}
