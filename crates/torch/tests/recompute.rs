//! Recomputation changes memory, not numbers.

use duet_torch::{init, recompute};
use tch::{Device, Kind, Tensor};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn leaf(shape: &[i64]) -> Tensor {
    random(shape).set_requires_grad(true)
}

fn layer(x: &Tensor, weight: &Tensor) -> Tensor {
    x.matmul(weight).gelu("tanh").layer_norm::<Tensor>([8], None, None, 1e-5, false)
}

#[test]
fn gradients_are_those_of_a_plain_call_bit_for_bit() -> Outcome {
    init(1)?;
    let weights: Vec<Tensor> = (0..3).map(|_| leaf(&[8, 8])).collect();
    let start = leaf(&[4, 8]);
    let all: Vec<&Tensor> = weights.iter().chain([&start]).collect();
    let plain = weights.iter().fold(start.shallow_clone(), |x, weight| layer(&x, weight));
    let plain_grads = Tensor::run_backward(&[plain.square().sum(Kind::Float)], &all, false, false);
    let mut x = start.shallow_clone();
    for weight in &weights {
        let held = weight.shallow_clone();
        x = recompute(&[&x], &[weight], move |inputs| vec![layer(&inputs[0], &held)])?.remove(0);
    }
    assert_eq!(x, plain);
    x.square().sum(Kind::Float).backward();
    for (param, expected) in all.iter().zip(&plain_grads) {
        assert_eq!(&param.grad(), expected);
    }
    Ok(())
}

#[test]
fn parameters_get_gradients_where_no_input_wants_one() -> Outcome {
    init(1)?;
    let weight = leaf(&[8, 8]);
    let held = weight.shallow_clone();
    let x = random(&[2, 8]);
    let y = recompute(&[&x], &[&weight], move |inputs| vec![layer(&inputs[0], &held)])?.remove(0);
    assert!(y.requires_grad());
    y.square().sum(Kind::Float).backward();
    assert!(weight.grad().defined());
    assert!(!x.grad().defined());
    Ok(())
}

#[test]
fn without_gradients_it_is_a_plain_call() -> Outcome {
    init(1)?;
    let weight = leaf(&[8, 8]);
    let x = random(&[2, 8]);
    let expected = layer(&x, &weight);
    let got = tch::no_grad(|| {
        let held = weight.shallow_clone();
        recompute(&[&x], &[&weight], move |inputs| vec![layer(&inputs[0], &held)])
    })?;
    assert_eq!(got[0], expected);
    assert!(!got[0].requires_grad());
    Ok(())
}

#[test]
fn outputs_that_nothing_reads_are_left_out() -> Outcome {
    init(1)?;
    let (a, b) = (leaf(&[3]), leaf(&[3]));
    let outputs = recompute(&[&a, &b], &[], |inputs| vec![&inputs[0] * 2.0, &inputs[1] * 3.0])?;
    outputs[0].sum(Kind::Float).backward();
    assert_eq!(a.grad(), Tensor::from_slice(&[2f32, 2.0, 2.0]));
    assert!(!b.grad().defined() || b.grad().abs().sum(Kind::Float).double_value(&[]) == 0.0);
    Ok(())
}

#[test]
fn a_panic_in_the_body_is_an_error() -> Outcome {
    init(1)?;
    let x = leaf(&[2]);
    let failed = recompute(&[&x], &[], |inputs| vec![inputs[0].matmul(&inputs[0].unsqueeze(0))]);
    assert!(failed.is_err());
    Ok(())
}
