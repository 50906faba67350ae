//! Laws of sampling and of replaying what was sampled.

mod common;

use duet_core::Seed;
use duet_core::work::{Finish, Window};
use duet_models::decoder::Decoder;
use duet_models::embed::Embedder;
use duet_models::flow::FlowSchedule;
use duet_models::generate::{SampleOptions, generate};
use duet_models::logprob::token_log_probs;
use duet_models::lora::{Lora, LoraConfig};
use duet_models::pipeline::Pipeline;
use duet_models::render::{Condition, RenderOptions, Sampler, render, replay};
use duet_models::sde::SdeKind;
use tch::{Kind, Tensor};

fn options(temperature: f64) -> SampleOptions {
    SampleOptions { traces: 5, max_new_tokens: 70, temperature, eos: Vec::new() }
}

fn prompt(pipeline: &Pipeline) -> Vec<i64> {
    pipeline.tokenizer.encode("<|im_start|>user\nThe number after three<|im_end|>\n").unwrap()
}

/// Logits of a whole sequence, computed without cache.
fn whole(pipeline: &Pipeline, tokens: &[i64]) -> Tensor {
    let ids = Tensor::from_slice(tokens).unsqueeze(0);
    tch::no_grad(|| pipeline.lm.logits(&pipeline.lm.hidden(&ids, None)).squeeze_dim(0))
}

#[test]
fn greedy_sampling_is_the_argmax_of_the_whole_sequence() {
    common::one_thread();
    let pipeline = common::pipeline(2);
    let prompt = prompt(&pipeline);
    let decoder = Decoder::new(&pipeline.lm).unwrap();
    let answers = generate(&decoder, &prompt, &Seed::root(1), &options(0.0)).unwrap();
    for answer in &answers {
        assert_eq!((answer, answer.finish), (&answers[0], Finish::Length));
    }
    let tokens = [prompt.clone(), answers[0].tokens.clone()].concat();
    let best = whole(&pipeline, &tokens).argmax(-1, false);
    for (index, token) in answers[0].tokens.iter().enumerate() {
        assert_eq!(best.int64_value(&[(prompt.len() + index) as i64 - 1]), *token, "at {index}");
    }
}

/// The fused kernels of the CPU give what libtorch's operations give, at every position past a
/// block of the cache; and each row is the same, to the last bit, whoever else is in the batch.
#[test]
fn fused_decoding_equals_operations_and_ignores_the_batch() {
    common::one_thread();
    let pipeline = common::pipeline(8);
    let (fused, plain) = (Decoder::new(&pipeline.lm).unwrap(), Decoder::plain(&pipeline.lm));
    let ids = Tensor::from_slice(&prompt(&pipeline)).unsqueeze(0);
    for rows in [1i64, 2, 3, 5, 11] {
        let start = |decoder: &Decoder<'_>, rows: i64| {
            let mut prefix = decoder.cache();
            let logits = decoder.advance(&ids, &mut prefix).unwrap();
            (logits, prefix.fork(rows, 70))
        };
        let ((a, mut one), (b, mut other)) = (start(&fused, rows), start(&plain, rows));
        let (_, mut alone) = start(&fused, 1);
        assert!(a.allclose(&b, 1e-5, 1e-6, false));
        for position in 0..70i64 {
            let tokens = (Tensor::arange(rows, (Kind::Int64, tch::Device::Cpu)) * 31
                + position * 7)
                .remainder(pipeline.lm.config().vocab_size)
                .unsqueeze(1);
            let got = fused.advance(&tokens, &mut one).unwrap();
            let want = plain.advance(&tokens, &mut other).unwrap();
            let far = (&got - &want).abs().max().double_value(&[]);
            let scale = want.abs().max().double_value(&[]);
            assert!(far <= 2e-5 * scale, "{rows} rows at {position}: {far} of {scale}");
            let row = fused.advance(&tokens.narrow(0, rows - 1, 1), &mut alone).unwrap();
            assert_eq!(row, got.narrow(0, rows - 1, 1), "{rows} rows at {position}");
        }
    }
}

/// A trace does not depend on who else is in the batch, nor on who has finished.
#[test]
fn a_trace_depends_on_its_own_numbers_only() {
    common::one_thread();
    let pipeline = common::pipeline(3);
    let (prompt, seed) = (prompt(&pipeline), Seed::root(9));
    let decoder = Decoder::new(&pipeline.lm).unwrap();
    let five = generate(&decoder, &prompt, &seed, &options(1.0)).unwrap();
    let one = SampleOptions { traces: 1, ..options(1.0) };
    assert_eq!(generate(&decoder, &prompt, &seed, &one).unwrap()[0], five[0]);
    assert!(five.iter().any(|answer| answer.tokens != five[0].tokens));

    // Ending on a token that some traces have early cuts those and changes nothing else.
    let eos = five[1].tokens[3];
    let cut = SampleOptions { eos: vec![eos], ..options(1.0) };
    for (short, long) in generate(&decoder, &prompt, &seed, &cut).unwrap().iter().zip(&five) {
        match long.tokens.iter().position(|token| *token == eos) {
            Some(at) => {
                assert_eq!((&short.tokens[..], short.finish), (&long.tokens[..=at], Finish::Stop));
            }
            None => assert_eq!(short, long),
        }
    }
}

#[test]
fn log_probs_are_those_of_each_sequence_alone() {
    common::one_thread();
    let pipeline = common::pipeline(4);
    let prompt = prompt(&pipeline);
    let answers: Vec<Vec<i64>> = vec![vec![5, 6, 7, 8], vec![9], vec![300, 2, 11]];
    let got = token_log_probs(&pipeline.lm, &prompt, &answers, 0.7, true).unwrap();
    assert_eq!(got.lengths, [4, 1, 3]);
    let got = got.split();
    for (answer, got) in answers.iter().zip(got) {
        let tokens = [prompt.clone(), answer.clone()].concat();
        let logs = (whole(&pipeline, &tokens) / 0.7).log_softmax(-1, Kind::Float);
        for (index, token) in answer.iter().enumerate() {
            let want = logs.double_value(&[(prompt.len() + index) as i64 - 1, *token]);
            let got = got.double_value(&[index as i64]);
            assert!((got - want).abs() < 2e-5, "{got} != {want}");
        }
    }
}

#[test]
fn impossible_arguments_are_refused() {
    let pipeline = common::pipeline(4);
    let decoder = Decoder::new(&pipeline.lm).unwrap();
    let seed = Seed::root(1);
    assert!(generate(&decoder, &[], &seed, &options(1.0)).is_err());
    assert!(generate(&decoder, &[-1], &seed, &options(1.0)).is_err());
    assert!(generate(&decoder, &[1; 500], &seed, &options(1.0)).is_err());
    assert!(generate(&decoder, &[1], &seed, &options(f64::NAN)).is_err());
    assert!(token_log_probs(&pipeline.lm, &[1], &[vec![]], 1.0, false).is_err());
    assert!(token_log_probs(&pipeline.lm, &[1], &[vec![1]], 0.0, false).is_err());
}

#[test]
fn embeddings_do_not_depend_on_the_batch() {
    common::one_thread();
    let pipeline = common::pipeline(5);
    let embedder = Embedder::new(&pipeline.lm, &pipeline.tokenizer).unwrap();
    assert_eq!(embedder.embed(" ").unwrap().size(), [6, 32]);
    let long = "four ".repeat(900);
    let prompts = ["a red four", " ", long.as_str()];
    for (prompt, batched) in prompts.iter().zip(embedder.embed_many(&prompts).unwrap()) {
        let alone = embedder.embed(prompt).unwrap();
        assert!(alone.size()[0] <= 512);
        assert!(alone.allclose(&batched, 1e-4, 1e-5, false), "{prompt:.20}");
    }
}

/// Several conditions as one batch give what each gives alone, and the copy for sampling, adapters folded
/// into its weights, what they give beside them.
#[test]
fn one_batch_of_conditions_and_folded_adapters_change_nothing() {
    common::one_thread();
    let mut pipeline = common::pipeline(9);
    let targets = LoraConfig::dit_targets();
    let config = LoraConfig { rank: 4, alpha: 8.0, targets };
    let lora = Lora::attach(&mut pipeline.dit, config, &Seed::root(1)).unwrap();
    tch::no_grad(|| {
        for (_, tensor) in lora.params().iter() {
            let noise = duet_torch::normal_tensor(&Seed::root(2), &tensor.size()) * 0.1;
            tensor.shallow_clone().copy_(&noise);
        }
    });
    let dit = &pipeline.dit;
    let noise = |shape: &[i64]| duet_torch::normal_tensor(&Seed::root(4), shape);
    let (latents, grid) = (noise(&[3, 12, 16]), (3, 4));
    let mods = dit.modulations(&Tensor::from_slice(&[0.9f32, 0.3]));
    let condition = |length: i64| {
        let text = dit.text(&noise(&[1, length, 32]), None).unwrap().expand(3);
        (text, dit.positions(length, grid))
    };
    let conditions = [condition(9), condition(1), condition(4)];
    let together = dit.forward_each(&latents, &conditions, &mods, 1).unwrap();
    let sampled = || {
        let copy = dit.folded().unwrap().expect("a small model on the CPU");
        tch::no_grad(|| copy.forward_each(&latents, &conditions, &mods, 1).unwrap())
    };
    let folded = sampled();
    for (index, (text, positions)) in conditions.iter().enumerate() {
        let alone = dit.forward(&latents, text, positions, &mods, Some(1)).unwrap();
        for found in [&together[index], &folded[index]] {
            let far = (found - &alone).abs().max().double_value(&[]);
            assert!(far <= 2e-5 * alone.abs().max().double_value(&[]), "{index}: {far}");
        }
    }
    lora.without(|| {
        let plain = dit.forward_each(&latents, &conditions, &mods, 1).unwrap();
        assert!(!plain[0].allclose(&together[0], 1e-3, 1e-3, false), "the adapter does something");
        let far = (&sampled()[0] - &plain[0]).abs().max().double_value(&[]);
        assert!(far <= 2e-5 * plain[0].abs().max().double_value(&[]), "without: {far}");
    });
    assert!(dit.forward_each(&latents, &[], &mods, 0).is_err());
}

fn render_options(guidance: f64, sde: SdeKind) -> RenderOptions {
    RenderOptions { steps: 6, guidance, sde, noise_level: 0.8, width: 32, height: 24 }
}

/// Invariant: with unchanged weights the trainer's log-probabilities are the rollout's, bit for
/// bit, so the ratio is exactly one.
#[test]
fn the_on_policy_ratio_is_exactly_one() {
    common::one_thread();
    let pipeline = common::pipeline(6);
    let embedder = Embedder::new(&pipeline.lm, &pipeline.tokenizer).unwrap();
    let (embeds, negative) = (embedder.embed("a red four").unwrap(), embedder.embed(" ").unwrap());
    let condition = Condition { embeds: &embeds, negative: Some(&negative) };
    for (guidance, sde, start) in [
        (4.0, SdeKind::FlowGrpo, 0),
        (4.0, SdeKind::FlowGrpo, 3),
        (1.0, SdeKind::Cps, 1),
        (2.0, SdeKind::Dance, 2),
    ] {
        let options = render_options(guidance, sde);
        let window = Window { start, len: 2 };
        let out = render(&pipeline, condition, 3, window, &Seed::root(3), &options).unwrap();
        assert_eq!(out.images.size(), [3, 24, 32, 3]);
        assert_eq!(out.latents.size(), [3, 3, 12, 16]);
        assert_eq!(out.log_probs.size(), [3, 2]);
        pipeline.dit.params().set_trainable(|_| true);
        let schedule = FlowSchedule::new(&pipeline.flow, 6, 12).unwrap();
        let sampler =
            Sampler::new(&pipeline.dit, schedule, condition, (3, (3, 4)), window, &options)
                .unwrap();
        let again = replay(&sampler, &out.latents, 0..2).unwrap();
        let ratio = (&again.log_probs - &out.log_probs).exp();
        assert_eq!(ratio, ratio.ones_like(), "{sde:?} at {start}");
        let second = replay(&sampler, &out.latents, 1..2).unwrap();
        assert_eq!(second.log_probs, out.log_probs.narrow(1, 1, 1));

        // Equal rewards have advantage zero, and that has gradient zero.
        (&ratio * 0.0).sum(Kind::Float).backward();
        for (name, tensor) in pipeline.dit.params().iter() {
            let grad = tensor.grad();
            let zero = !grad.defined() || grad.abs().max().double_value(&[]) == 0.0;
            assert!(zero, "{name} has a gradient");
        }
        pipeline.dit.params().set_trainable(|_| false);
    }
}

/// Law: a noise level of zero renders what the ODE renders, bit for bit by the same model, and up to
/// rounding by its copy for sampling; and a leaf does not depend on the others.
#[test]
fn rendering_without_noise_is_the_ode() {
    common::one_thread();
    let pipeline = common::pipeline(7);
    let embedder = Embedder::new(&pipeline.lm, &pipeline.tokenizer).unwrap();
    let embeds = embedder.embed("a red four").unwrap();
    let condition = Condition { embeds: &embeds, negative: Some(&embeds) };
    let seed = Seed::root(3);
    let all = Window { start: 0, len: 6 };
    let options = RenderOptions { noise_level: 0.0, ..render_options(3.0, SdeKind::FlowGrpo) };
    let silent = render(&pipeline, condition, 2, all, &seed, &options).unwrap();
    let plain = render(&pipeline, condition, 2, Window::default(), &seed, &options).unwrap();
    let ode = tch::no_grad(|| {
        let schedule = FlowSchedule::new(&pipeline.flow, 6, 12).unwrap();
        let none = Window::default();
        let sampler =
            Sampler::new(&pipeline.dit, schedule, condition, (2, (3, 4)), none, &options).unwrap();
        let start = silent.latents.select(1, 0);
        (0..6).fold(start, |x, index| {
            let velocity = sampler.velocity(&x, index).unwrap();
            duet_models::sde::step(&sampler.coefficients(index), &x, &velocity, None).next
        })
    });
    assert_eq!(silent.last, ode);
    let far = (&plain.last - &ode).abs().max().double_value(&[]);
    assert!(far <= 2e-5 * ode.abs().max().double_value(&[]), "{far}");
    assert_eq!(plain.latents.size()[1], 0);
    let three = render(&pipeline, condition, 3, Window::default(), &seed, &options).unwrap();
    assert!(three.last.narrow(0, 0, 2).allclose(&plain.last, 1e-4, 1e-4, false));
    let odd = RenderOptions { width: 20, ..options };
    assert!(render(&pipeline, condition, 2, all, &seed, &odd).is_err());
}
