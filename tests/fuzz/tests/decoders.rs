//! A short search of every decoder, the same on every machine: its examples, and changes of them.
//! `make fuzz` searches for as long as one likes, guided by coverage.

use duet_core::Seed;
use duet_fuzz::TARGETS;

/// Changed inputs for each target.
const CHANGES: u64 = 30_000;
/// Pieces that parsers are sensitive to.
const PIECES: [&[u8]; 12] = [
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\0\0\0\0\0\0\0\0",
    b"\x7f\xff\xff\xff",
    b"{",
    b"\"",
    b"[[[[[[[[[[[[[[[[",
    b"\xed\xa0\x80",
    b"1e999",
    b"-1",
    b"\n",
    b"18446744073709551616",
    b"nan",
];

/// Numbers from a seed.
struct Dice(Seed, u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.1 += 1;
        (self.0.uniform(self.1) * sides as f64) as usize
    }

    /// One to eight changes of a part of the input.
    fn change(&mut self, input: &mut Vec<u8>, others: &[Vec<u8>]) {
        for _ in 0..=self.roll(8) {
            let at = self.roll(input.len());
            match self.roll(6) {
                _ if input.is_empty() => input.push(self.roll(256) as u8),
                0 => input[at] ^= 1 << self.roll(8),
                1 => input[at] = self.roll(256) as u8,
                2 => input.truncate(at),
                3 => drop(input.splice(at..at, PIECES[self.roll(PIECES.len())].iter().copied())),
                4 => drop(input.drain(at..(at + 1 + self.roll(16)).min(input.len()))),
                _ => {
                    let other = &others[self.roll(others.len())];
                    let from = self.roll(other.len());
                    let to = (from + self.roll(64)).min(other.len());
                    drop(input.splice(at..at, other[from..to].iter().copied()));
                }
            }
        }
    }
}

#[test]
fn no_decoder_breaks() {
    for target in &TARGETS {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has no example", target.name);
        seeds.iter().for_each(|seed| (target.run)(seed));
        let mut dice = Dice(Seed::root(11), 0);
        for _ in 0..CHANGES {
            let mut input = seeds[dice.roll(seeds.len())].clone();
            dice.change(&mut input, &seeds);
            (target.run)(&input);
        }
    }
}

#[test]
fn what_once_broke_a_decoder_does_not_again() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in &TARGETS {
        let files = std::fs::read_dir(folder.join(target.name)).into_iter().flatten().flatten();
        for file in files {
            (target.run)(&std::fs::read(file.path()).expect("a corpus file can be read"));
        }
    }
}
