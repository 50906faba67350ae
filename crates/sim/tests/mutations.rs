//! Each seeded fault of the scheduler is found: `cargo test -p duet-sim --features mutations`.
#![cfg(feature = "mutations")]

use duet_core::mutation::{Mutation, choose};
use duet_sim::{Options, simulate};

#[test]
fn every_mutation_is_found() {
    for mutation in Mutation::ALL {
        choose(Some(mutation));
        let found = (0..400).any(|seed| simulate(&Options::new(seed)).broken.is_some());
        choose(None);
        assert!(found, "{mutation:?} was not found in 400 seeds");
    }
}
