//! One side of `make bench`: the same work as scripts/bench/models.py gives to the Python
//! libraries, timed one piece at a time on request.
//!
//! ```text
//! speed make FOLDER            writes the two pipelines of random weights, and the file to load
//! speed load FOLDER THREADS    loads the file, prints MILLISECONDS
//! speed serve FOLDER THREADS   reads names of pieces from its input, prints `NAME MILLISECONDS`
//! ```

mod iteration;
mod pipelines;
mod work;

use duet_torch::tensorfile::{TensorFile, TensorSource};
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["make", folder] => {
            duet_torch::init(1)?;
            pipelines::make(Path::new(folder))
        }
        ["serve", folder, threads] => serve(Path::new(folder), threads.parse()?),
        ["load", folder, threads] => load(Path::new(folder), threads.parse()?),
        ["rank", folder, address, rank, world] => {
            iteration::rank(Path::new(folder), address, rank.parse()?, world.parse()?)
        }
        _ => {
            Err("usage: speed make FOLDER | speed load FOLDER THREADS | speed serve FOLDER THREADS"
                .into())
        }
    }
}

/// Loads the large file and says how many milliseconds that took.
fn load(folder: &Path, threads: u32) -> Outcome<()> {
    duet_torch::init(threads)?;
    drop(Tensor::zeros([1 << 20], (Kind::Float, Device::Cpu)).copy());
    let start = Instant::now();
    let file = TensorFile::open(folder.join("large.safetensors"))?;
    let parts = file.load_all(Device::Cpu)?;
    let took = start.elapsed();
    if parts.len() != 64 {
        return Err("parts of the file are missing".into());
    }
    println!("{}", took.as_secs_f64() * 1e3);
    Ok(())
}

fn serve(folder: &Path, threads: u32) -> Outcome<()> {
    duet_torch::init(threads)?;
    let mut work = work::Work::new(folder, threads)?;
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    for line in std::io::stdin().lock().lines() {
        let name = line?;
        let start = Instant::now();
        work.run(&name)?;
        writeln!(out, "{name} {}", start.elapsed().as_secs_f64() * 1e3)?;
    }
    Ok(())
}
