//! The services, and the only place of this crate where messages of `duet.v1` are known.

mod control;
mod lines;
mod roles;
mod status;
mod worker;

pub use control::Control;
pub use roles::Roles;
pub use status::StatusPage;
pub use worker::Workers;

use crate::driver::Gone;
use duet_proto::convert::{DecodeError, Sender};
use duet_proto::v1 as wire;
use tonic::Status;

/// The coordinator is going: ask its successor.
fn gone(gone: Gone) -> Status {
    Status::unavailable(gone.to_string())
}

/// A message that cannot be taken.
fn malformed(error: DecodeError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn sender(caller: Option<wire::Caller>) -> Result<Sender, Status> {
    Sender::try_from(caller).map_err(malformed)
}
