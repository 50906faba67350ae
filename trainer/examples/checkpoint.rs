//! Checkpoints and publication of a made-up state, as trainer ranks and rollout workers write and read
//! them; what `scripts/bench/checkpoint.py` times. One process for each rank and worker.
//!
//! ```text
//! checkpoint serve FOLDER MIB RANKS WORKERS    starts the others; then, a line each:
//!   save N     a checkpoint of MIB MiB: prints seconds until its manifest is there, and those that
//!              training waits (the copy)
//!   load N     every rank restores the whole state: prints seconds
//!   publish N  64 MiB from rank 0 to all workers: written, fetched, verified, in place: prints seconds
//! ```

use bytes::Bytes;
use duet_core::work::{Report, Weights};
use duet_core::{ArtifactRef, Digest, Generation, PolicyVersion, TrainerEpoch};
use duet_store::checkpoint::FORMAT;
use duet_store::keys::{self, Branch};
use duet_store::{Manifest, Store};
use duet_torch::Tensors;
use duet_torch::tensorfile::{
    Assembly, Metadata, Piece, TensorFile, TensorSource, encode, encode_into, lay_pieces,
};
use duet_trainer::rank::Place;
use duet_trainer::saver::Saver;
use duet_trainer::shards;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Tensors of the state.
const TENSORS: u32 = 64;
/// Size of the published adapters.
const ADAPTERS: u32 = 64;

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| -> Outcome<u32> { Ok(words.get(at).ok_or("too few words")?.parse()?) };
    match words.first().map(String::as_str) {
        Some("serve") => serve(&words[1], number(2)?, number(3)?, number(4)?),
        Some("rank") => rank(&words[1], number(2)?, number(3)?, number(4)?),
        _ => Err("say `serve FOLDER MIB RANKS WORKERS`".into()),
    }
}

/// Another process, told a line and answering a line.
struct Other {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Other {
    fn start(folder: &str, mib: u32, number: u32, ranks: u32) -> Outcome<Other> {
        let words = ["rank", folder, &mib.to_string(), &number.to_string(), &ranks.to_string()]
            .map(str::to_owned);
        let mut child = Command::new(std::env::current_exe()?)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let to = child.stdin.take().ok_or("no pipe")?;
        let from = BufReader::new(child.stdout.take().ok_or("no pipe")?);
        Ok(Other { child, to, from })
    }

    fn tell(&mut self, line: &str) -> Outcome<()> {
        writeln!(self.to, "{line}")?;
        Ok(self.to.flush()?)
    }

    fn heard(&mut self) -> Outcome<String> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        match line.trim() {
            "" => Err("a process has ended".into()),
            line => Ok(line.to_owned()),
        }
    }
}

fn ask(others: &mut [Other], line: &str) -> Outcome<Vec<String>> {
    others.iter_mut().try_for_each(|other| other.tell(line))?;
    others.iter_mut().map(Other::heard).collect()
}

fn serve(folder: &str, mib: u32, ranks: u32, workers: u32) -> Outcome<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let store = Store::open(folder)?;
    let start = |number| Other::start(folder, mib, number, ranks);
    let mut trainers = (0..ranks).map(start).collect::<Outcome<Vec<_>>>()?;
    let mut samplers = (ranks..ranks + workers).map(start).collect::<Outcome<Vec<_>>>()?;
    for other in trainers.iter_mut().chain(&mut samplers) {
        other.heard()?;
    }
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line?;
        let Some((what, number)) = line.split_once(' ') else { break };
        let version = PolicyVersion(number.parse()?);
        let begun = Instant::now();
        match what {
            "save" => {
                let mut blocked: f64 = 0.0;
                let mut shards = Vec::new();
                for answer in ask(&mut trainers, &line)? {
                    let (copied, shard) = answer.split_once(' ').ok_or("no answer")?;
                    blocked = blocked.max(copied.parse()?);
                    shards.push(vec![serde_json::from_str(shard)?]);
                }
                runtime.block_on(store.checkpoints().write(&manifest(version, shards)))?;
                println!("save {} {blocked}", begun.elapsed().as_secs_f64());
            }
            "load" => {
                ask(&mut trainers, &line)?;
                println!("load {}", begun.elapsed().as_secs_f64());
            }
            "publish" => {
                trainers[0].tell(&line)?;
                let file = trainers[0].heard()?;
                ask(&mut samplers, &format!("take {file}"))?;
                println!("publish {}", begun.elapsed().as_secs_f64());
            }
            other => return Err(format!("`{other}` is nothing to do").into()),
        }
    }
    for mut other in trainers.into_iter().chain(samplers) {
        drop(other.to);
        other.child.wait()?;
    }
    Ok(())
}

fn manifest(version: PolicyVersion, shards: Vec<Vec<ArtifactRef>>) -> Manifest {
    Manifest {
        format: FORMAT.to_owned(),
        version,
        world: shards.len() as u32,
        shards,
        weights: Weights { version, llm: None, dit: None, digest: Digest([0; 32]) },
        scheduler: None,
        journal_position: 0,
        generation: Generation(1),
        run: "bench".to_owned(),
        config: Digest([0; 32]),
        created_unix_ms: 0,
        notes: [].into(),
    }
}

fn numbers(count: u32, mib: u32) -> Outcome<Tensors> {
    let each = i64::from(mib) * (1 << 18) / i64::from(count);
    let one = |n| Ok((format!("t{n:03}"), Tensor::f_rand([each], (Kind::Float, Device::Cpu))?));
    (0..count).map(one).collect()
}

/// A trainer rank, or a rollout worker when its number is beyond the ranks.
fn rank(folder: &str, mib: u32, number: u32, ranks: u32) -> Outcome<()> {
    duet_torch::init(1)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let store = Store::open(folder)?;
    let (mut saver, mut told) = Saver::new(store.clone());
    let state = if number < ranks { numbers(TENSORS, mib)? } else { Tensors::new() };
    let adapters = numbers(TENSORS, ADAPTERS)?;
    let place = Place {
        epoch: TrainerEpoch(1),
        rank: number,
        world: ranks,
        host: String::new(),
        deadline: Duration::from_secs(60),
    };
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line?;
        let Some((what, rest)) = line.split_once(' ') else { break };
        match what {
            "save" => {
                let version = PolicyVersion(rest.parse()?);
                let begun = Instant::now();
                let own = state.iter().zip(0u32..).filter(|(_, n)| n % ranks == number);
                let own = own.map(|((name, t), _)| Piece::whole(name, t.shallow_clone()));
                let mut metadata = Metadata::new();
                let own = lay_pieces(own, &mut metadata)?;
                let mut image = runtime.block_on(saver.memory())?;
                encode_into(&own, &metadata, &mut image)?;
                let copied = begun.elapsed().as_secs_f64();
                let report = runtime.block_on(async {
                    saver.begin(&place, version, image);
                    told.recv().await
                });
                let Some(Report::ShardDone(done)) = report else {
                    return Err(format!("{report:?}").into());
                };
                println!("{copied} {}", serde_json::to_string(&done.shards[0])?);
            }
            "load" => {
                let version = PolicyVersion(rest.parse()?);
                let manifest = runtime.block_on(store.checkpoints().at(version))?.manifest;
                let files = runtime.block_on(shards::open(&store, &manifest))?;
                let saved = Assembly::new(files)?;
                for (name, tensor) in &state {
                    saved.copy_into(name, tensor)?;
                }
                println!("loaded");
            }
            "publish" => {
                let key = keys::weights(PolicyVersion(rest.parse()?), Branch::Dit, place.epoch);
                let bytes = Bytes::from(encode(&adapters, &Metadata::new())?);
                let file = runtime.block_on(store.artifacts().put(&key, bytes))?;
                println!("{}", serde_json::to_string(&file)?);
            }
            _ => {
                let file: ArtifactRef = serde_json::from_str(rest)?;
                let bytes = runtime.block_on(store.artifacts().get(&file))?;
                let new =
                    TensorFile::from_bytes("adapters", bytes.into())?.load_all(Device::Cpu)?;
                duet_torch::require_finite(&new)?;
                for (name, tensor) in &new {
                    adapters[name].shallow_clone().f_copy_(tensor)?;
                }
                println!("taken");
            }
        }
    }
    Ok(())
}
