//! The coordinator: drives the pure scheduler of `duet_core` and is the only writer of a run's
//! journal. It calls nobody; workers, operators and watchers call it.
//!
//! ```text
//! gRPC handlers --Handle--> Driver (owns Scheduler, Journal) --Job--> Keeper (checkpoints, lineage,
//!      ^                      |  1. events in                            |     metrics.jsonl, garbage)
//!      |                      |  2. records made durable                 |
//!      +------- replies ------+  3. effects, replies         <--Event----+
//! ```
//! | who | waits for | who unblocks it |
//! |---|---|---|
//! | a handler | the driver's reply, for a poll at most `poll` | the driver, after the append |
//! | the driver | a request, the keeper, the scheduler's next deadline, the shutdown token | handlers, keeper, clock, signals |
//! | the keeper | a job | the driver |
//!
//! Every queue between them is bounded; the driver never waits for a handler, and the keeper never
//! waits for the driver. All of them are tasks of one thread, on which the driver also waits for a journal on
//! a disk of this machine (`docs/decisions/0006`); [`stall`] looks from another one whether it moves.
#![forbid(unsafe_code)]

pub mod clock;
pub mod codec;
pub mod driver;
pub mod error;
pub mod exposition;
pub mod grpc;
pub mod identity;
pub mod keeper;
pub mod options;
pub mod service;
pub mod stall;

pub use driver::Handle;
pub use error::CoordinatorError;
pub use options::Options;
pub use service::Service;
