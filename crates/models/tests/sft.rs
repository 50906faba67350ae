//! Packing changes where examples lie, never what is learned from them.

mod common;

use common::{one_thread, pipeline};
use duet_models::lm::Lm;
use duet_models::logprob::token_log_probs;
use duet_models::sft::{Example, pack, row_loss};
use tch::Tensor;

/// Examples of different lengths: (prompt, answer).
fn examples(vocabulary: i64) -> Vec<(Vec<i64>, Vec<i64>)> {
    let list = |seed: i64, n: i64| (0..n).map(|i| (seed * 31 + i * 17 + 5) % vocabulary).collect();
    [(3, 4), (7, 1), (1, 9), (5, 5)]
        .into_iter()
        .zip(1i64..)
        .map(|((prompt, answer), seed)| (list(seed, prompt), list(seed + 40, answer)))
        .collect()
}

fn gradient(lm: &Lm, loss: &Tensor) -> Vec<Tensor> {
    loss.backward();
    let take = |(_, tensor): (&str, &Tensor)| {
        let grad = tensor.grad().copy();
        tensor.shallow_clone().zero_grad();
        grad
    };
    lm.params().iter().map(take).collect()
}

#[test]
fn a_packed_row_has_the_loss_and_the_gradient_of_its_examples() {
    one_thread();
    let lm = pipeline(5).lm;
    lm.params().set_trainable(|_| true);
    let pairs = examples(lm.config().vocab_size);
    let list: Vec<Example> = pairs.iter().map(|(p, a)| Example::new(p, a).unwrap()).collect();
    let all: Vec<&Example> = list.iter().collect();
    let packed = row_loss(&lm, &all).unwrap();
    let alone: Vec<_> = all.iter().map(|one| row_loss(&lm, &[*one]).unwrap()).collect();
    let sum = alone.iter().fold(Tensor::from(0f32), |sum, one| sum + &one.sum);
    let (one, other) = (packed.sum.double_value(&[]), sum.double_value(&[]));
    assert!((one - other).abs() < 1e-4 * other.abs(), "{one} {other}");
    let right: f64 = alone.iter().map(|one| one.right.double_value(&[])).sum();
    assert_eq!(packed.right.double_value(&[]), right);
    for (a, b) in gradient(&lm, &packed.sum).iter().zip(gradient(&lm, &sum)) {
        let apart = (a - &b).abs().max().double_value(&[]);
        assert!(apart < 1e-4 * (1.0 + b.abs().max().double_value(&[])), "{apart}");
    }
    // The same number by the function that rollout and trainer use.
    let by_log_probs: f64 = pairs
        .iter()
        .map(|(prompt, answer)| {
            let logs = token_log_probs(&lm, prompt, std::slice::from_ref(answer), 1.0, false);
            -logs.unwrap().values.sum(tch::Kind::Double).double_value(&[])
        })
        .sum();
    assert!((one - by_log_probs).abs() < 1e-4 * one.abs(), "{one} {by_log_probs}");
}

#[test]
fn every_item_is_packed_once_and_rows_keep_their_capacity() {
    let lengths: Vec<usize> = (0..200).map(|i| 1 + (i * 37) % 50).collect();
    for capacity in [1, 40, 64, 1000] {
        let rows = pack(&lengths, capacity);
        let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
        for row in &rows {
            let used: usize = row.iter().map(|index| lengths[*index]).sum();
            assert!(row.len() == 1 || used <= capacity, "{used} in a row of {capacity}");
            assert!(row.windows(2).all(|pair| pair[0] < pair[1]), "in the order given");
        }
        let total: usize = lengths.iter().sum();
        if capacity == 64 {
            assert!(rows.len() * 64 < total * 13 / 10, "{} rows for {total} tokens", rows.len());
        }
    }
    assert!(pack(&[], 10).is_empty());
}

#[test]
fn what_cannot_be_learned_is_refused() {
    one_thread();
    let lm = pipeline(5).lm;
    assert!(Example::new(&[], &[1]).is_err() && Example::new(&[1], &[]).is_err());
    assert!(row_loss(&lm, &[]).is_err());
    let alien = Example::new(&[0, 1_000_000], &[2]).unwrap();
    assert!(row_loss(&lm, &[&alien]).unwrap_err().to_string().contains("1000000"));
}
