//! Seeded faults of the scheduler itself, to show that the simulator finds faults.
//!
//! Compiled in only with the feature `mutations`; without it every [`Mutation::on`] is `false` at
//! compile time. One mutation at most is on, per thread, chosen by name.

/// A fault that can be switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Reports of old attempts count.
    AcceptStale,
    /// A step is committed twice.
    DoubleCommit,
    /// A lease goes to a worker that never acknowledged its policy version.
    SkipVersionCheck,
    /// A failed attempt is tried again at once.
    ForgetBackoff,
    /// A failed score counts as zero.
    FailedScoreIsZero,
    /// The attempt number does not grow.
    ReuseAttempt,
    /// A unit stays in its queue when it is leased.
    LeaseTwice,
    /// Trees are sampled with the newest version instead of version i - L.
    SampleAhead,
    /// Rendered sub-trees are not queued for scoring after a restart.
    ForgetOnRestart,
    /// A failed attempt changes the state without a record.
    SkipRecord,
    /// A unit that always fails is tried for ever.
    NeverGiveUp,
    /// A step starts while a tree of its iteration is still in flight.
    TrainEarly,
    /// Trees are dropped with the commit instead of with the checkpoint, so a replay lacks them.
    CollectEarly,
    /// What a lost worker held is never given to another.
    LoseWithWorker,
    /// Ranks are not compared with one another, nor a replay with what was committed.
    SkipDigest,
    /// A manifest is written when the first rank's shard is there.
    ManifestEarly,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Mutation; 16] = [
        Mutation::AcceptStale,
        Mutation::DoubleCommit,
        Mutation::SkipVersionCheck,
        Mutation::ForgetBackoff,
        Mutation::FailedScoreIsZero,
        Mutation::ReuseAttempt,
        Mutation::LeaseTwice,
        Mutation::SampleAhead,
        Mutation::ForgetOnRestart,
        Mutation::SkipRecord,
        Mutation::NeverGiveUp,
        Mutation::TrainEarly,
        Mutation::CollectEarly,
        Mutation::LoseWithWorker,
        Mutation::SkipDigest,
        Mutation::ManifestEarly,
    ];

    /// Whether this mutation is on in this thread.
    #[cfg(feature = "mutations")]
    pub fn on(self) -> bool {
        chosen::get() == Some(self)
    }

    /// Never: the feature `mutations` is off.
    #[cfg(not(feature = "mutations"))]
    #[inline(always)]
    pub const fn on(self) -> bool {
        false
    }
}

#[cfg(feature = "mutations")]
pub use chosen::choose;

#[cfg(feature = "mutations")]
mod chosen {
    use super::Mutation;
    use std::cell::Cell;

    thread_local! {
        static CHOSEN: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    pub(super) fn get() -> Option<Mutation> {
        CHOSEN.get()
    }

    /// Switches one mutation on in this thread, or all off.
    pub fn choose(mutation: Option<Mutation>) {
        CHOSEN.set(mutation);
    }
}
