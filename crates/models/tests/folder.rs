//! A pipeline folder written here reads back as the same model.

mod common;

use duet_models::pipeline::Pipeline;
use std::path::PathBuf;

fn tensors(pipeline: &Pipeline) -> Vec<(String, tch::Tensor)> {
    let parts = [
        pipeline.lm.params(),
        pipeline.dit.params(),
        pipeline.vae.params(),
    ];
    parts
        .into_iter()
        .flat_map(|params| params.to_map())
        .collect()
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
    for file in [
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "vae/config.json",
    ] {
        let bytes = |root: &PathBuf| std::fs::read(root.join(file)).unwrap();
        assert_eq!(bytes(&path), bytes(&again), "{file}");
    }
    let text = "the number after three<|im_end|>";
    assert_eq!(
        made.tokenizer.encode(text).unwrap(),
        read.tokenizer.encode(text).unwrap()
    );
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
