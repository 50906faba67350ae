//! One rank of a group on this machine that sums a tensor whenever it is told to: a line on standard
//! input, the seconds it took on standard output. `scripts/bench/collectives.py` times it beside
//! PyTorch's own.
//!
//! ```text
//! allreduce RANK WORLD MIB [ADDRESS]    rank 0 prints the address that the others are given
//! allreduce --nccl MIB                  a group of one on a GPU: sums checked, bandwidth printed
//! ```

use duet_torch::collective::{AbortHandle, Collective, Gloo, GroupOptions, Nccl, Store};
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Sums of one timed round.
const REPEATS: usize = 3;

fn options(rank: u32, world: u32) -> GroupOptions {
    let (group, host) = ("bench".to_owned(), "127.0.0.1".to_owned());
    GroupOptions { rank, world, group, host, deadline: Duration::from_secs(60), threads: 2 }
}

fn gloo(arguments: &[String]) -> Outcome<()> {
    duet_torch::init(1)?;
    let (rank, world) = (arguments[0].parse::<u32>()?, arguments[1].parse::<u32>()?);
    let patient = Duration::from_secs(60);
    let store = match arguments.get(3) {
        Some(address) => Store::connect(address, patient)?,
        None => Store::serve("127.0.0.1", patient)?,
    };
    if rank == 0 {
        println!("{}", store.address());
    }
    let group = Gloo::connect(Arc::new(store), options(rank, world), AbortHandle::default())?;
    let tensor = Tensor::ones([elements(&arguments[2])?], (Kind::Float, Device::Cpu));
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        line?;
        let _ = tensor.shallow_clone().fill_(1.0);
        group.barrier()?;
        let began = Instant::now();
        for _ in 0..REPEATS {
            group.all_reduce(&tensor)?;
        }
        let took = began.elapsed().as_secs_f64() / REPEATS as f64;
        let expected = f64::from(world).powi(REPEATS as i32);
        if tensor.min().double_value(&[]) != expected || tensor.max().double_value(&[]) != expected
        {
            return Err(format!("the sum is not {expected}").into());
        }
        println!("{took}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn elements(mib: &str) -> Outcome<i64> {
    Ok(mib.parse::<i64>()? << 18)
}

/// A group of one: two ranks cannot share a GPU. All that NCCL does there is copying, which shows that
/// it is loaded, called and waited for as it should be.
fn nccl(mib: &str) -> Outcome<()> {
    let library = duet_torch::init(1)?.library;
    println!("NCCL {}", Nccl::version(&library)?);
    let store = Arc::new(Store::serve("127.0.0.1", Duration::from_secs(60))?);
    let abort = AbortHandle::default();
    let group = Nccl::connect(store, options(0, 1), (0, &library), abort.clone())?;
    let gpu = (Kind::Float, Device::Cuda(0));
    let numbers = Tensor::randn([elements(mib)?], gpu);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Int64, Kind::Uint8] {
        let expected = (&numbers * 10).abs().to_kind(kind);
        let tensor = expected.copy();
        group.all_reduce(&tensor)?;
        group.broadcast(&tensor, 0)?;
        group.begin_reduce_scatter(&tensor)?.wait()?;
        let gathered = tensor.zeros_like();
        group.all_gather(&gathered, &tensor)?;
        check(gathered == expected, &format!("{kind:?}"))?;
    }
    // Written on libtorch's stream just before, and read just after, again and again.
    let tensor = Tensor::zeros([elements(mib)?], gpu);
    for round in 1..=50 {
        let _ = tensor.shallow_clone().g_add_scalar_(1.0);
        let begun = [group.begin_all_reduce(&tensor)?, group.begin_all_reduce(&tensor)?];
        for pending in begun {
            pending.wait()?;
        }
        check(tensor.max().double_value(&[]) == f64::from(round), "the order of streams")?;
    }
    let host = Tensor::arange(1000, (Kind::Int64, Device::Cpu));
    let copy = host.copy();
    group.all_reduce(&copy)?;
    check(copy == host, "a tensor of the host")?;
    let began = Instant::now();
    for _ in 0..20 {
        group.all_reduce(&tensor)?;
    }
    let each = began.elapsed().as_secs_f64() / 20.0;
    println!("all-reduce of {mib} MiB: {:.1} GB/s", tensor.numel() as f64 * 4e-9 / each);
    abort.abort();
    check(group.barrier().is_err(), "an aborted group")?;
    println!("as expected");
    Ok(())
}

fn check(holds: bool, what: &str) -> Outcome<()> {
    if holds { Ok(()) } else { Err(format!("not as expected: {what}").into()) }
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("--nccl") if arguments.len() == 2 => nccl(&arguments[1]),
        Some(_) if arguments.len() >= 3 => gloo(&arguments),
        _ => Err("usage: allreduce RANK WORLD MIB [ADDRESS] | allreduce --nccl MIB".into()),
    }
}
