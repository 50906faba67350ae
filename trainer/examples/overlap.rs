//! What it brings to sum gradients over ranks while the backward pass still runs: forward, backward and
//! sums of two ranks, threads of this process connected by Gloo, with and without, in turn.
//! Prints JSON: medians in seconds.

use duet_torch::Tensors;
use duet_torch::collective::{AbortHandle, Collective, Gloo, GroupOptions, Store};
use duet_trainer::TrainError;
use duet_trainer::engine::gradient::{Gradient, Sharing};
use duet_trainer::engine::layout::Seat;
use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

const WORLD: u32 = 2;
const LAYERS: usize = 16;
const WIDTH: i64 = 1024;
const ROWS: i64 = 128;
const ROUNDS: usize = 15;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn weights() -> Tensors {
    let one = |layer| {
        let weight = Tensor::randn([WIDTH, WIDTH], (Kind::Float, Device::Cpu)) / 32.0;
        (format!("layers.{layer}.weight"), weight.set_requires_grad(true))
    };
    (0..LAYERS).map(one).collect()
}

/// Seconds of a step, and a number of its gradient.
fn step(
    gradient: &mut Gradient,
    weights: &Tensors,
    input: &Tensor,
    group: &dyn Collective,
) -> Outcome<(f64, f64)> {
    let leaves: Vec<Tensor> =
        gradient.layout().names().iter().map(|name| weights[name].shallow_clone()).collect();
    group.barrier()?;
    let began = Instant::now();
    gradient.clear();
    let mut sums = gradient.reduction(group, 1, 1)?;
    let hidden = leaves.iter().fold(input.shallow_clone(), |x, w| x.matmul(w).tanh());
    gradient.begin_pass(&mut sums);
    let loss = hidden.square().mean(Kind::Float);
    duet_torch::backward::<TrainError>(&loss, &leaves, &mut |leaf, grad| {
        gradient.take(&mut sums, leaf, &grad)
    })?;
    gradient.end_pass(&mut sums)?;
    gradient.finish(&mut sums)?;
    let took = began.elapsed().as_secs_f64();
    gradient.learn_order(group)?;
    Ok((took, gradient.norm(group)?.0))
}

/// Seconds of each step, with and without.
fn rank(rank: u32, address: &str) -> Outcome<[Vec<f64>; 2]> {
    tch::set_num_threads(1);
    let patient = Duration::from_secs(60);
    let store = Arc::new(Store::connect(address, patient)?);
    let (group, host) = ("overlap".to_owned(), "127.0.0.1".to_owned());
    let options = GroupOptions { rank, world: WORLD, group, host, deadline: patient, threads: 2 };
    let group = Gloo::connect(store, options, AbortHandle::default())?;
    let weights = weights();
    for weight in weights.values() {
        group.broadcast(&weight.detach(), 0)?;
    }
    let input = Tensor::randn([ROWS, WIDTH], (Kind::Float, Device::Cpu));
    let make = |overlap| {
        let sharing = Sharing { zero: 0, each_micro_batch: false, overlap, bucket_bytes: 4 << 20 };
        Gradient::new(&weights, Seat { rank, world: WORLD }, sharing)
    };
    let mut gradients = [make(true)?, make(false)?];
    let mut seconds = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS + 2 {
        let mut norms = [0.0; 2];
        for (at, gradient) in gradients.iter_mut().enumerate() {
            let (took, norm) = step(gradient, &weights, &input, &group)?;
            norms[at] = norm;
            if round >= 2 {
                seconds[at].push(took);
            }
        }
        if norms[0].to_bits() != norms[1].to_bits() {
            return Err(format!("overlap changes numbers: {norms:?}").into());
        }
    }
    Ok(seconds)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Outcome<()> {
    duet_torch::init(1)?;
    let server = Store::serve("127.0.0.1", Duration::from_secs(60))?;
    let start = |number| {
        let address = server.address().to_owned();
        thread::spawn(move || rank(number, &address))
    };
    let ranks: Vec<_> = (0..WORLD).map(start).collect();
    let mut slowest = [vec![0f64; ROUNDS], vec![0f64; ROUNDS]];
    for rank in ranks {
        let seconds = rank.join().map_err(|_| "a rank panicked")??;
        for (all, own) in slowest.iter_mut().zip(seconds) {
            all.iter_mut().zip(own).for_each(|(all, own)| *all = all.max(own));
        }
    }
    let [with, without] = slowest.map(median);
    let mib = (LAYERS as i64 * WIDTH * WIDTH) >> 18;
    println!(r#"{{"ranks": {WORLD}, "mib": {mib}, "with": {with}, "without": {without}}}"#);
    Ok(())
}
