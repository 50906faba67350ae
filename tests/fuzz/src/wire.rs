//! Messages as they arrive: the first byte says which, the rest is protobuf.

use duet_core::work::{Assignment, PromptRow, Report, Trace, Weights};
use duet_core::work::{Gates, Lease, LeaseId, Rendezvous, Step, StepDone, TrainTree, Window};
use duet_core::{ArtifactRef, TreeId};
use duet_proto::convert::Sender;
use duet_proto::v1 as wire;
use prost::Message;

/// What the core makes of a message is what it makes of that message sent on.
fn there_and_back<W, C>(bytes: &[u8])
where
    W: Message + Default + for<'a> From<&'a C>,
    C: TryFrom<W>,
    <C as TryFrom<W>>::Error: std::fmt::Display,
{
    let Ok(message) = W::decode(bytes) else { return };
    let core = match C::try_from(message) {
        Ok(core) => core,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let sent = W::from(&core).encode_to_vec();
    let again = W::decode(sent.as_slice()).ok().and_then(|message| C::try_from(message).ok());
    let again = again.expect("what was accepted is accepted again");
    assert!(W::from(&again).encode_to_vec() == sent, "what was accepted changes when sent on");
}

/// Those that the core has its own type for and that are plain enough to be copied.
fn copied<W, C>(bytes: &[u8])
where
    W: Message + Default + From<C>,
    C: TryFrom<W> + Copy,
{
    let Ok(message) = W::decode(bytes) else { return };
    let Ok(core) = C::try_from(message) else { return };
    let sent = W::from(core).encode_to_vec();
    let again = W::decode(sent.as_slice()).ok().and_then(|message| C::try_from(message).ok());
    let again = again.expect("what was accepted is accepted again");
    assert!(W::from(again).encode_to_vec() == sent, "what was accepted changes when sent on");
}

/// Requests whose fields the coordinator takes apart itself.
fn caller(caller: Option<wire::Caller>) {
    if let Ok(sender) = Sender::try_from(caller) {
        let again = Sender::try_from(Some(wire::Caller::from(&sender)));
        assert!(again.is_ok(), "what was accepted is accepted again");
    }
}

const KINDS: [fn(&[u8]); 18] = [
    there_and_back::<wire::Report, Report>,
    there_and_back::<wire::Assignment, Assignment>,
    there_and_back::<wire::Lease, Lease>,
    there_and_back::<wire::Step, Step>,
    there_and_back::<wire::StepDone, StepDone>,
    there_and_back::<wire::Trace, Trace>,
    there_and_back::<wire::TrainTree, TrainTree>,
    there_and_back::<wire::Rendezvous, Rendezvous>,
    there_and_back::<wire::Weights, Weights>,
    there_and_back::<wire::PromptRow, PromptRow>,
    there_and_back::<wire::ArtifactRef, ArtifactRef>,
    copied::<wire::Window, Window>,
    copied::<wire::Gates, Gates>,
    copied::<wire::LeaseId, LeaseId>,
    copied::<wire::TreeId, TreeId>,
    |bytes| drop(wire::RegisterRequest::decode(bytes).map(|request| caller(request.caller))),
    |bytes| drop(wire::LeaveRequest::decode(bytes).map(|request| caller(request.caller))),
    |bytes| drop(wire::ReportRequest::decode(bytes).map(|request| caller(request.caller))),
];

/// Feeds the decoder that the first byte names.
pub fn run(bytes: &[u8]) {
    if let Some((kind, message)) = bytes.split_first() {
        KINDS[usize::from(*kind) % KINDS.len()](message);
    }
}

/// A message of each shape that matters.
pub fn seeds() -> Vec<Vec<u8>> {
    let at = wire::ArtifactRef { key: "a/b".to_owned(), digest: vec![7; 32], bytes: 9 };
    let weights =
        wire::Weights { version: 3, llm: Some(at.clone()), dit: None, digest: vec![1; 32] };
    let prompt =
        wire::PromptRow { row: 2, text: "two plus three".to_owned(), meta: "{}".to_owned() };
    let with = |kind: u8, message: Vec<u8>| [vec![kind], message].concat();
    let mut seeds = vec![
        with(8, weights.encode_to_vec()),
        with(9, prompt.encode_to_vec()),
        with(10, at.encode_to_vec()),
        with(11, wire::Window { start: 1, len: 2 }.encode_to_vec()),
    ];
    // Every kind at least once, so that a search knows of it.
    seeds.extend((0..KINDS.len() as u8).map(|kind| with(kind, at.encode_to_vec())));
    seeds
}
