//! A pipeline folder written here reads back as the same model.

mod common;

use duet_models::pipeline::Pipeline;
use duet_models::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};
use tch::Tensor;

fn tensors(pipeline: &Pipeline) -> Vec<(String, tch::Tensor)> {
    let parts = [pipeline.lm.params(), pipeline.dit.params(), pipeline.vae.params()];
    parts.into_iter().flat_map(|params| params.to_map()).collect()
}

#[test]
fn a_folder_reads_back_bit_for_bit() {
    common::one_thread();
    let made = common::pipeline(1);
    let folder = tempfile::tempdir().unwrap();
    // With the variable set, the folder stays for `scripts/parity` to load in diffusers.
    let kept = std::env::var_os("DUET_PARITY_FOLDER").map(PathBuf::from);
    let path = kept.unwrap_or_else(|| folder.path().join("a"));
    made.save(&path).unwrap();
    let read = Pipeline::load(&path).unwrap();
    for ((name, a), (other, b)) in tensors(&made).iter().zip(tensors(&read).iter()) {
        assert_eq!((name, a), (other, b));
    }
    let again = folder.path().join("b");
    read.save(&again).unwrap();
    for file in ["text_encoder/model.safetensors", "tokenizer/tokenizer.json", "vae/config.json"] {
        let bytes = |root: &PathBuf| std::fs::read(root.join(file)).unwrap();
        assert_eq!(bytes(&path), bytes(&again), "{file}");
    }
    let text = "the number after three<|im_end|>";
    assert_eq!(made.tokenizer.encode(text).unwrap(), read.tokenizer.encode(text).unwrap());
}

#[test]
fn the_embedding_template_takes_34_tokens() {
    let tokenizer = common::tokenizer();
    let prefix = "<|im_start|>system\nDescribe the image by detailing the color, shape, size, \
        texture, quantity, text, spatial relationships of the objects and background:<|im_end|>\n\
        <|im_start|>user\n";
    assert_eq!(tokenizer.encode(prefix).unwrap().len(), 34);
    let ids = tokenizer.encode("a red four\n").unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "a red four\n");
}

fn saved() -> tempfile::TempDir {
    common::one_thread();
    let folder = tempfile::tempdir().unwrap();
    common::pipeline(1).save(folder.path()).unwrap();
    folder
}

/// Renames every tensor of the text encoder's file and writes it in two shards with an index.
fn rewrite(folder: &Path, rename: impl Fn(&str) -> String) {
    let stem = folder.join("text_encoder/model");
    let single = stem.with_extension("safetensors");
    let tensors = Tensor::read_safetensors(&single).unwrap();
    std::fs::remove_file(&single).unwrap();
    let mut map = serde_json::Map::new();
    for (number, half) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", number + 1);
        let named: Vec<(String, &Tensor)> =
            half.iter().map(|(name, tensor)| (rename(name), tensor)).collect();
        Tensor::write_safetensors(&named, folder.join("text_encoder").join(&file)).unwrap();
        map.extend(named.iter().map(|(name, _)| (name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    let path = folder.join("text_encoder/model.safetensors.index.json");
    std::fs::write(path, index.to_string()).unwrap();
}

/// Shards with an index, and the nested names of newer files.
#[test]
fn shards_and_both_layouts_are_read() {
    let folder = saved();
    let flat = Pipeline::load(folder.path()).unwrap();
    rewrite(folder.path(), |name| match name.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None => format!("model.{name}"),
    });
    let nested = Pipeline::load(folder.path()).unwrap();
    assert!(nested.lm.params().contains("model.language_model.norm.weight"));
    let ids = Tensor::from_slice(&[1i64, 5, 9]).unsqueeze(0);
    assert_eq!(flat.lm.hidden(&ids, None), nested.lm.hidden(&ids, None));
    let again = tempfile::tempdir().unwrap();
    nested.save(again.path()).unwrap();
    let tensors = Tensor::read_safetensors(again.path().join("text_encoder/model.safetensors"));
    let names: Vec<String> = tensors.unwrap().into_iter().map(|(name, _)| name).collect();
    assert!(names.iter().any(|name| name == "model.visual.merger.ln_q.weight"), "{names:?}");
}

#[test]
fn a_tokenizer_without_its_json_is_the_same() {
    let folder = saved();
    let whole = Tokenizer::load(&folder.path().join("tokenizer")).unwrap();
    std::fs::remove_file(folder.path().join("tokenizer/tokenizer.json")).unwrap();
    let parts = Tokenizer::load(&folder.path().join("tokenizer")).unwrap();
    for text in ["<|im_start|>user\nThe number, 12.\n\n<|im_end|>", "naïve ☃  x", ""] {
        assert_eq!(whole.encode(text).unwrap(), parts.encode(text).unwrap());
    }
    assert_eq!((whole.size(), whole.im_end()), (parts.size(), parts.im_end()));
}

/// Every breakage is an error that names the file, and the tensor or key where there is one.
#[test]
fn broken_folders_are_refused_by_name() {
    let refused = |break_it: &dyn Fn(&Path), words: &[&str]| {
        let folder = saved();
        break_it(folder.path());
        let error = Pipeline::load(folder.path()).expect_err("loads").to_string();
        for word in words {
            assert!(error.contains(word), "`{error}` does not name `{word}`");
        }
    };
    let edit = |folder: &Path, file: &str, from: &str, to: &str| {
        let path = folder.join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    };
    refused(&|f| std::fs::remove_file(f.join("model_index.json")).unwrap(), &["model_index.json"]);
    let vae = "vae/diffusion_pytorch_model.safetensors";
    refused(&|f| std::fs::remove_file(f.join(vae)).unwrap(), &[vae]);
    refused(
        &|f| {
            let bytes = std::fs::read(f.join(vae)).unwrap();
            std::fs::write(f.join(vae), &bytes[..bytes.len() - 9]).unwrap();
        },
        &[vae],
    );
    refused(&|f| std::fs::write(f.join(vae), b"no").unwrap(), &[vae]);
    refused(
        &|f| {
            let mut tensors = Tensor::read_safetensors(f.join(vae)).unwrap();
            let odd =
                tensors.iter_mut().find(|(name, _)| name == "decoder.conv_in.weight").unwrap();
            odd.1 = odd.1.to_kind(tch::Kind::Int64);
            Tensor::write_safetensors(&tensors, f.join(vae)).unwrap();
        },
        &["vae", "decoder.conv_in.weight", "I64"],
    );
    let dit = "transformer/config.json";
    let layers = |to| move |f: &Path| edit(f, dit, "\"num_layers\": 2", to);
    refused(&layers("\"num_layers\": 3"), &["transformer", "transformer_blocks.2.", "missing"]);
    refused(&layers("\"num_layers\": 0"), &[dit, "num_layers"]);
    refused(
        &|f| edit(f, dit, "\"joint_attention_dim\": 32", "\"joint_attention_dim\": 34"),
        &["transformer", "txt_norm.weight", "34"],
    );
    refused(
        &|f| edit(f, dit, "\"guidance_embeds\": false", "\"guidance_embeds\": true"),
        &[dit, "guidance_embeds"],
    );
    refused(
        &|f| edit(f, "vae/config.json", "\"z_dim\": 4", "\"z_dim\": 5"),
        &["vae", "latents_mean"],
    );
    refused(&|f| edit(f, "scheduler/scheduler_config.json", "{", "["), &["scheduler_config.json"]);
    refused(
        &|f| edit(f, "tokenizer/tokenizer.json", "<|im_end|>", "<|im_over|>"),
        &["tokenizer", "<|im_end|>"],
    );
}

/// A published folder has its tokenizer in `tokenizer/` and no processor: what is written from it can be
/// given to `AutoTokenizer` and `AutoProcessor` as it is.
#[test]
fn a_folder_that_diffusers_wrote_gets_a_tokenizer_and_a_processor_at_its_root() {
    common::one_thread();
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let fixtures = std::env::var_os("DUET_FIXTURES").map_or_else(|| own.into(), PathBuf::from);
    let published = fixtures.join("pipeline");
    assert!(!published.join("tokenizer_config.json").exists());
    let temporary = tempfile::tempdir().unwrap();
    // With the variable set, the folder stays for `scripts/parity` to load in diffusers.
    let kept = std::env::var_os("DUET_PARITY_AGAIN").map(PathBuf::from);
    let again = kept.unwrap_or_else(|| temporary.path().join("again"));
    Pipeline::load(&published).unwrap().save(&again).unwrap();
    let bytes = |path: PathBuf| std::fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    for name in ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"] {
        assert_eq!(bytes(again.join(name)), bytes(again.join("tokenizer").join(name)));
    }
    // transformers 4.57 looks for these where 5.x does not write them.
    let json = |path: PathBuf| serde_json::from_slice::<serde_json::Value>(&bytes(path)).unwrap();
    let before = json(published.join("text_encoder/config.json"));
    let after = json(again.join("text_encoder/config.json"));
    assert!(before["text_config"].get("tie_word_embeddings").is_none());
    assert_eq!(after["text_config"]["tie_word_embeddings"], before["tie_word_embeddings"]);
    assert_eq!(after["text_config"]["rope_theta"], 1e6);
    let section = &before["text_config"]["rope_parameters"]["mrope_section"];
    assert_eq!(&after["text_config"]["rope_scaling"]["mrope_section"], section);
    assert!(json(again.join("transformer/config.json")).get("zero_cond_t").is_none());
    let processor: serde_json::Value =
        serde_json::from_slice(&bytes(again.join("preprocessor_config.json"))).unwrap();
    assert_eq!(processor["processor_class"], "Qwen2_5_VLProcessor");
    assert!(!again.join("processor").exists(), "an empty folder");
    // What a folder has at its root stays.
    let [second, third] = ["second", "third"].map(|name| temporary.path().join(name));
    Pipeline::load(&again).unwrap().save(&second).unwrap();
    std::fs::write(second.join("preprocessor_config.json"), "{}").unwrap();
    Pipeline::load(&second).unwrap().save(&third).unwrap();
    assert_eq!(bytes(third.join("preprocessor_config.json")), b"{}");
}
