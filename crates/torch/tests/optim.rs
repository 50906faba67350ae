//! AdamW and clipping against PyTorch 2.11.0's own results, bit for bit, and against the formula.

use duet_torch::Tensors;
use duet_torch::optim::{AdamW, AdamWOptions, OptimError, clip_grad_norm};
use tch::{Device, Kind, Tensor};

const OPTIONS: AdamWOptions =
    AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
const START: [f32; 7] = [0.5, -1.25, 3.0, 1e-3, -2e-2, 7.5, 0.0];

fn named(name: &str, tensor: Tensor) -> Tensors {
    [(name.to_owned(), tensor)].into()
}

/// Gradients over seven orders of magnitude, of both signs, some zero.
fn gradient(step: i64) -> Tensor {
    let values: Vec<f64> = (0..7)
        .map(|i| ((i * 31 + step * 17) % 13 - 6) as f64 / 7.0 * 10f64.powi(i as i32 - 3))
        .collect();
    Tensor::from_slice(&values).to_kind(Kind::Float)
}

fn bits(tensor: &Tensor) -> Vec<i32> {
    Vec::try_from(tensor.detach().to_kind(Kind::Float).view_dtype(Kind::Int).view(-1)).unwrap()
}

#[test]
fn five_steps_are_pytorchs_bits() {
    // torch.optim.AdamW([p], lr=3e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
    // foreach=False) of PyTorch 2.11.0 on the CPU, same start and gradients; bits as int32. Its
    // square root is MKL's, which has code of its own for each maker's processors: the fifth element
    // is the first of these on AMD's (Zen 3), the second on Intel's (with AVX2 and with AVX-512).
    const PARAM: [i32; 7] =
        [1057986046, -1080586419, 1077700091, 1032620474, -1111656653, 1089092514, -1154034458];
    const PARAM_INTEL: [i32; 7] =
        [1057986046, -1080586419, 1077700091, 1032620474, -1111656652, 1089092514, -1154034458];
    const EXP_AVG: [i32; 7] =
        [-1213941132, -1175823042, -1141888076, -1114708141, 1060706167, 1082908177, 1111287586];
    const EXP_AVG_SQ: [i32; 7] =
        [867063850, 916924586, 978700100, 1029325919, 1085016986, 1145450764, 1195522552];
    let params = named("p", Tensor::from_slice(&START));
    let mut adamw = AdamW::new(OPTIONS, &params).unwrap();
    for step in 0..5 {
        adamw.step(3e-2, &params, &named("p", gradient(step))).unwrap();
    }
    let found = bits(&params["p"]);
    assert!(found == PARAM || found == PARAM_INTEL, "{found:?}");
    assert_eq!(bits(&adamw.state()["p.exp_avg"]), EXP_AVG);
    assert_eq!(bits(&adamw.state()["p.exp_avg_sq"]), EXP_AVG_SQ);
    assert_eq!(adamw.steps(), 5);
}

#[test]
fn it_follows_the_formula_of_the_paper() {
    let params = named("p", Tensor::from_slice(&START).to_kind(Kind::Double));
    let mut adamw = AdamW::new(OPTIONS, &params).unwrap();
    let mut by_hand: Vec<(f64, f64, f64)> =
        START.iter().map(|p| (f64::from(*p), 0.0, 0.0)).collect();
    for step in 0..10 {
        let grad = gradient(step);
        let lr = 1e-2 / (step + 1) as f64;
        adamw.step(lr, &params, &named("p", grad.to_kind(Kind::Double))).unwrap();
        for (i, (p, m, v)) in by_hand.iter_mut().enumerate() {
            let g = grad.double_value(&[i as i64]);
            *m = 0.9 * *m + (1.0 - 0.9) * g;
            *v = 0.95 * *v + (1.0 - 0.95) * g * g;
            let t = step as i32 + 1;
            let (m_hat, v_hat) = (*m / (1.0 - 0.9f64.powi(t)), *v / (1.0 - 0.95f64.powi(t)));
            *p = *p - lr * 0.1 * *p - lr * m_hat / (v_hat.sqrt() + 1e-8);
        }
    }
    for (i, (p, ..)) in by_hand.iter().enumerate() {
        let found = params["p"].double_value(&[i as i64]);
        assert!((found - p).abs() <= 1e-12 * (1.0 + p.abs()), "{i}: {found} {p}");
    }
}

#[test]
fn a_restored_state_continues_bit_for_bit() {
    let run = |restart: bool| {
        let params = named("p", Tensor::from_slice(&START));
        let mut adamw = AdamW::new(OPTIONS, &params).unwrap();
        for step in 0..6 {
            if restart && step == 3 {
                let saved: Tensors =
                    adamw.state().iter().map(|(n, t)| (n.clone(), t.copy())).collect();
                let steps = adamw.steps();
                adamw = AdamW::new(OPTIONS, &params).unwrap();
                adamw.load(steps, &saved).unwrap();
            }
            adamw.step(3e-2, &params, &named("p", gradient(step))).unwrap();
        }
        bits(&params["p"])
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn half_precision_accumulates_in_single_precision() {
    let params = named("p", Tensor::ones([1], (Kind::BFloat16, Device::Cpu)));
    let options = AdamWOptions { weight_decay: 0.0, ..OPTIONS };
    let mut adamw = AdamW::new(options, &params).unwrap();
    let grad = named("p", Tensor::ones([1], (Kind::BFloat16, Device::Cpu)));
    for _ in 0..100 {
        // Each step is below half a unit in the last place of bf16 at one (2^-8).
        adamw.step(1e-3, &params, &grad).unwrap();
    }
    let found = params["p"].double_value(&[0]);
    assert!((found - 0.9).abs() < 4e-3, "{found}");
    assert!((adamw.state()["p.master"].double_value(&[0]) - 0.9).abs() < 1e-5);
}

#[test]
fn mismatches_are_refused_and_change_nothing() {
    let params = named("p", Tensor::from_slice(&START));
    let mut adamw = AdamW::new(OPTIONS, &params).unwrap();
    let error = adamw.step(0.1, &params, &Tensors::new()).unwrap_err();
    assert_eq!(error.to_string(), "`p` has no gradient");
    let error = adamw.step(0.1, &params, &named("q", gradient(0))).unwrap_err();
    assert!(matches!(error, OptimError::Unknown(name) if name == "q"));
    let error = adamw
        .step(0.1, &params, &named("p", Tensor::zeros([2], (Kind::Float, Device::Cpu))))
        .unwrap_err();
    assert_eq!(error.to_string(), "`p` has shape [2], expected [7]");
    assert!(adamw.load(3, &Tensors::new()).is_err());
    assert_eq!((adamw.steps(), bits(&params["p"])), (0, bits(&Tensor::from_slice(&START))));
}

#[test]
fn clipping_is_pytorchs() {
    // torch.nn.utils.clip_grad_norm_(..., 1.0, foreach=False), bits as int32.
    let grads: Tensors = [
        ("a".to_owned(), Tensor::from_slice(&[3f32, -4.0])),
        ("b".to_owned(), Tensor::from_slice(&[1.5f32, 2.5]).view([2, 1])),
    ]
    .into();
    let norm = clip_grad_norm(&grads, 1.0).unwrap();
    assert_eq!((norm as f32).to_bits() as i32, 1085879969);
    assert_eq!(bits(&grads["a"]), [1057271983, -1087313004]);
    assert_eq!(bits(&grads["b"]), [1048883375, 1054680697]);
    // Already short enough: not one bit changes.
    let before = bits(&grads["a"]);
    clip_grad_norm(&grads, 10.0).unwrap();
    assert_eq!(bits(&grads["a"]), before);
    let bad = named("a", Tensor::from_slice(&[f32::NAN, 1.0]));
    assert!(clip_grad_norm(&bad, 1.0).unwrap().is_nan());
    assert_eq!(clip_grad_norm(&Tensors::new(), 1.0).unwrap(), 0.0);
}
