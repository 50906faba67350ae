//! A scorer that fails on some images.

use super::*;
use crate::reward::{FailurePolicy, mixed};

/// Whether the scorer fails on an image: on about three of ten.
fn fails(place: &str, leaf: usize) -> bool {
    Digest::of(format!("fails {place} {leaf}").as_bytes()).0[0] < 77
}

/// Plays a run; with `failing`, its scorer fails where [`fails`] says.
fn play(failing: bool) -> World {
    let reward = RewardSpec { failure: FailurePolicy::AtLeast(1), ..spec().reward };
    let mut world = World::new(RunSpec { leaves: 8, reward, ..spec() });
    world.join(1);
    loop {
        let scoring = world.inbox.front().and_then(|(worker, assignment)| match assignment {
            Assignment::Lease(lease @ Lease { work: Work::Score(_), .. }) => {
                Some((worker.clone(), lease.clone()))
            }
            _ => None,
        });
        let Some((worker, lease)) = scoring.filter(|_| failing) else {
            if !world.step(1) {
                return world;
            }
            continue;
        };
        world.inbox.pop_front();
        let Done::Score(mut scores) = work_of(&lease) else { panic!() };
        for (leaf, score) in scores.iter_mut().enumerate() {
            if fails(&lease.id.unit.place(), leaf) {
                score.insert("semantic".to_owned(), Score::Failed("answered 500".to_owned()));
            }
        }
        let outcome = Outcome::Done { result: Done::Score(scores), took: Millis(3) };
        let report = Report::Lease { id: lease.id, outcome };
        let reported = Event::Reported { worker: worker.clone(), session: 1, report };
        assert_eq!(world.event(reported), Verdict::Accepted);
        world.event(Event::Polled { worker, session: 1 });
    }
}

/// The rewards of all leaves by sub-tree, as journaled.
fn rewards(world: &World) -> Vec<Option<f64>> {
    let mix = &world.scheduler.spec.reward.dit;
    let scored: BTreeMap<Unit, Vec<Option<f64>>> = { world.journal.iter() }
        .filter_map(|record| match record {
            Record::Completed { id, result: Done::Score(leaves), .. } => {
                Some((id.unit, leaves.iter().map(|leaf| mixed(mix, leaf)).collect()))
            }
            _ => None,
        })
        .collect();
    scored.into_values().flatten().collect()
}

#[test]
fn du_8_a_scorer_that_fails_on_three_of_ten_leaves_the_other_rewards_as_they_are() {
    let (calm, failing) = (play(false), play(true));
    assert_eq!(failing.scheduler.finished(), Some(&FinishReason::Completed));
    let (all, some) = (rewards(&calm), rewards(&failing));
    let missing = some.iter().filter(|reward| reward.is_none()).count();
    assert_eq!(all.len(), some.len());
    assert!((20..40).contains(&(100 * missing / all.len())), "{missing} of {}", all.len());
    // Those that are there are the calm run's, to the bit: their mean and spread are untouched.
    let kept = |(one, other): (&Option<f64>, &Option<f64>)| one.is_none() || one == other;
    assert!(some.iter().zip(&all).all(kept));
    let there: Vec<f64> = some.iter().flatten().copied().collect();
    let same: Vec<f64> =
        all.iter().zip(&some).filter(|(_, s)| s.is_some()).filter_map(|(a, _)| *a).collect();
    assert_eq!(crate::advantage::moments(&there, 0), crate::advantage::moments(&same, 0));
    // And whoever asks is told how many are missing.
    let status = failing.scheduler.status(Millis(failing.now));
    assert_eq!(status.failures["missing-score/semantic"], missing as u64);
    assert!(calm.scheduler.status(Millis(calm.now)).failures.is_empty());
    // Nobody's lease failed over it.
    assert_eq!(failing.failures, []);
}
