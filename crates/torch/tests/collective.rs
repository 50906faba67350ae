//! Groups of real ranks, each on a thread of its own, over loopback TCP.

use duet_torch::collective::{
    AbortHandle, Collective, CollectiveError, Gloo, GroupOptions, Operation, Solo, Store,
};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tch::{Kind, Tensor};

const PATIENT: Duration = Duration::from_secs(60);

fn options(rank: u32, world: u32, deadline: Duration) -> GroupOptions {
    let (group, host) = ("test".to_owned(), "127.0.0.1".to_owned());
    GroupOptions { rank, world, group, host, deadline, threads: 1 }
}

/// Runs `body` on `world` ranks and gives their values in rank order.
fn ranks<T: Send + 'static>(
    world: u32,
    deadline: Duration,
    body: impl Fn(Gloo) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let server = Store::serve("127.0.0.1", PATIENT).unwrap();
    let address = server.address().to_owned();
    let body = Arc::new(body);
    let threads: Vec<_> = (0..world)
        .map(|rank| {
            let (body, address) = (body.clone(), address.clone());
            thread::spawn(move || {
                let store = Arc::new(Store::connect(&address, PATIENT).unwrap());
                let options = options(rank, world, deadline);
                body(Gloo::connect(store, options, AbortHandle::default()).unwrap())
            })
        })
        .collect();
    threads.into_iter().map(|t| t.join().unwrap()).collect()
}

fn pattern(rank: u32, len: i64) -> Tensor {
    let base = Tensor::arange(len, (Kind::Float, tch::Device::Cpu));
    ((base * 0.37 + f64::from(rank)).sin() * 1e3f64.powi(rank as i32 - 1)).to_kind(Kind::Float)
}

#[test]
fn operations_agree_with_their_definition() {
    for world in [2u32, 3] {
        let n = i64::from(world) * 1000;
        let outputs = ranks(world, PATIENT, move |group| {
            let mine = pattern(group.rank(), n);
            let sum = mine.copy();
            group.all_reduce(&sum).unwrap();
            let part = Tensor::zeros([n / i64::from(world)], (Kind::Float, tch::Device::Cpu));
            group.reduce_scatter(&part, &mine).unwrap();
            let gathered = Tensor::zeros([n], (Kind::Float, tch::Device::Cpu));
            group.all_gather(&gathered, &part).unwrap();
            let copied = mine.copy();
            group.broadcast(&copied, 1).unwrap();
            group.barrier().unwrap();
            let transposed = pattern(group.rank(), n).view([2, -1]).transpose(0, 1);
            group.all_reduce(&transposed).unwrap();
            (sum, gathered, copied, transposed)
        });
        let expected = (1..world).fold(pattern(0, n), |sum, rank| sum + pattern(rank, n));
        for (sum, gathered, copied, transposed) in &outputs {
            assert!(sum.allclose(&expected, 1e-6, 1e-4, false));
            assert_eq!(sum, &outputs[0].0, "all ranks hold the same bits");
            assert_eq!(gathered, sum, "reduce-scatter and all-gather make an all-reduce");
            assert_eq!(copied, &pattern(1, n));
            assert!(
                transposed.transpose(0, 1).reshape([-1]).allclose(&expected, 1e-6, 1e-4, false)
            );
        }
    }
}

#[test]
fn sums_are_the_same_bits_each_time() {
    let run = || {
        ranks(3, PATIENT, |group| {
            let tensors: Vec<_> = (1..20).map(|i| pattern(group.rank(), i * 911)).collect();
            let pending: Vec<_> =
                tensors.iter().map(|t| group.begin_all_reduce(t).unwrap()).collect();
            pending.into_iter().for_each(|p| p.wait().unwrap());
            tensors
        })
    };
    let (first, second) = (run(), run());
    assert_eq!(first, second);
    assert_eq!(first[0], first[2]);
}

#[test]
fn a_rank_that_stays_away_is_named() {
    let server = Arc::new(Store::serve("127.0.0.1", PATIENT).unwrap());
    let error =
        Gloo::connect(server, options(0, 3, Duration::from_millis(300)), AbortHandle::default())
            .err()
            .unwrap();
    let CollectiveError::TimedOut { operation: Operation::Rendezvous, missing, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(missing, &[1, 2]);
    assert!(error.to_string().ends_with("ranks 1, 2 are missing"), "{error}");
}

#[test]
fn a_rank_that_stops_answering_is_named_by_all_others() {
    let errors = ranks(3, Duration::from_millis(700), |group| {
        let tensor = pattern(group.rank(), 100);
        group.all_reduce(&tensor).unwrap();
        if group.rank() == 2 {
            return None; // dropped: its connections close
        }
        Some(group.all_reduce(&tensor).unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        match &error {
            CollectiveError::TimedOut { missing, .. } | CollectiveError::Failed { missing, .. } => {
                assert_eq!(missing, &[2], "{error}");
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn an_abort_ends_a_wait_long_before_its_deadline() {
    // A rank that goes away closes its connections, which the other would see before its own abort.
    static BOTH_GAVE_UP: std::sync::Barrier = std::sync::Barrier::new(2);
    let errors = ranks(2, PATIENT, |group| {
        if group.rank() == 1 {
            // Comes to the barrier only when rank 0 has given it up.
            let waiting = group.abort_handle();
            waiting.abort();
            let error = group.barrier().unwrap_err();
            BOTH_GAVE_UP.wait();
            return error;
        }
        let handle = group.abort_handle();
        let aborter = thread::spawn(move || handle.abort());
        let error = group.all_reduce(&pattern(0, 10)).unwrap_err();
        aborter.join().unwrap();
        BOTH_GAVE_UP.wait();
        error
    });
    for (rank, error) in errors.iter().enumerate() {
        assert!(matches!(error, CollectiveError::Aborted { .. }), "rank {rank}: {error}");
    }
}

#[test]
fn a_store_that_is_not_there_says_where_it_was_sought() {
    let error = Store::connect("127.0.0.1:1", Duration::from_millis(200)).err().unwrap();
    assert!(error.to_string().starts_with("rank store at 127.0.0.1:1: "), "{error}");
    let error = Store::connect("nowhere", PATIENT).err().unwrap();
    assert_eq!(error.to_string(), "rank store at nowhere: not an address of the form host:port");
}

#[test]
fn a_group_of_one_changes_nothing() {
    let solo = Solo::new();
    let tensor = pattern(0, 10);
    solo.all_reduce(&tensor).unwrap();
    let out = Tensor::zeros([10], (Kind::Float, tch::Device::Cpu));
    solo.reduce_scatter(&out, &tensor).unwrap();
    assert_eq!(out, pattern(0, 10));
    solo.abort_handle().abort();
    assert!(matches!(solo.barrier(), Err(CollectiveError::Aborted { .. })));
}
