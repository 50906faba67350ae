//! safetensors files: what is written comes back, and nothing broken comes in.

use duet_torch::Tensors;
use duet_torch::tensorfile::{
    Assembly, Content, Metadata, Piece, ShardedFile, TensorFile, TensorFileError, TensorSource,
    encode, encode_contents, lay_pieces, write, write_sharded,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use tch::{Device, Kind, Tensor};

fn sample() -> Tensors {
    let numbers = |kind, shape: &[i64]| {
        Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu))
            .to_kind(kind)
            .view(shape)
    };
    [
        ("layers.0.weight".to_owned(), numbers(Kind::Float, &[3, 5]).transpose(0, 1)),
        ("layers.1.weight".to_owned(), numbers(Kind::BFloat16, &[4])),
        ("scalar".to_owned(), Tensor::from(2.5f64)),
        ("images".to_owned(), numbers(Kind::Uint8, &[1, 2, 3])),
        ("empty".to_owned(), Tensor::zeros([0, 4], (Kind::Int64, Device::Cpu))),
    ]
    .into()
}

fn metadata() -> Metadata {
    [("format", "pt"), ("note", "two \"quotes\""), ("window", "3")]
        .map(|(a, b)| (a.into(), b.into()))
        .into()
}

#[test]
fn what_is_written_comes_back() {
    let bytes = encode(&sample(), &metadata()).unwrap();
    assert_eq!(bytes, encode(&sample(), &metadata()).unwrap(), "equal content, equal bytes");
    let file = TensorFile::from_bytes("sample", bytes.clone()).unwrap();
    assert_eq!(file.metadata(), &metadata());
    let back = file.load_all(Device::Cpu).unwrap();
    assert_eq!(back, sample());
    assert_eq!(back["scalar"].size(), [0i64; 0]);
    // The reference implementation reads it too.
    let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(reference.len(), 5);
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header % 8, 0);
}

#[test]
fn a_file_is_mapped_and_read_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let tensors = sample();
    let contents = tensors.iter().map(|(n, t)| (n.clone(), Content::Tensor(t))).collect();
    write(&path, &contents, &metadata()).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.spec("layers.0.weight").unwrap().shape, [5, 3]);
    let half = file.load_as("layers.0.weight", Device::Cpu, Kind::BFloat16).unwrap();
    assert_eq!(half.kind(), Kind::BFloat16);
    let label = path.display();
    for (error, text) in [
        (file.load("nobody", Device::Cpu).unwrap_err(), format!("{label} has no tensor `nobody`")),
        (
            file.load_exact("scalar", Device::Cpu, Kind::Float, &[]).unwrap_err(),
            format!("{label}: tensor `scalar` is Double, expected Float"),
        ),
        (
            file.load_exact("images", Device::Cpu, Kind::Uint8, &[6]).unwrap_err(),
            format!("{label}: tensor `images` has shape [1, 2, 3], expected [6]"),
        ),
    ] {
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_file_cut_after_it_was_opened_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    fs::write(&path, encode(&sample(), &metadata()).unwrap()).unwrap();
    let file = TensorFile::open(&path).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = file.load("scalar", Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("a.safetensors") && error.contains("scalar"), "{error}");
    assert!(error.contains("cannot read"), "{error}");
}

/// What a whole file takes in memory while it is loaded, by the system's count in a process of its own:
/// no second copy, and no page of a map.
#[test]
fn loading_holds_each_byte_once() {
    const FILE: &str = "DUET_TEST_LARGE_FILE";
    const PARTS: usize = 8;
    const SIZE: usize = PARTS * (16 << 20);
    if let Some(path) = std::env::var_os(FILE) {
        let file = TensorFile::open(path).unwrap();
        let before = peak_memory();
        let parts = file.load_all(Device::Cpu).unwrap();
        let taken = peak_memory() - before;
        assert_eq!(parts.len(), PARTS);
        assert!(taken <= SIZE + SIZE / 20, "{taken} bytes for {SIZE}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    let part = Tensor::ones([16 << 18], (Kind::Float, Device::Cpu));
    let contents = (0..PARTS).map(|at| (format!("part {at}"), Content::Tensor(&part))).collect();
    write(&path, &contents, &metadata()).unwrap();
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "loading_holds_each_byte_once", "--nocapture"])
        .env(FILE, &path)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// The most memory that this process has held, in bytes.
fn peak_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

#[test]
fn every_truncation_is_named() {
    let whole = encode(&sample(), &metadata()).unwrap();
    for len in 0..whole.len() {
        let error = TensorFile::from_bytes("cut", whole[..len].to_vec()).err().unwrap();
        assert!(matches!(error, TensorFileError::Truncated { .. }), "{len}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.safetensors");
    fs::write(&path, []).unwrap();
    let error = TensorFile::open(&path).err().unwrap();
    assert!(error.to_string().ends_with("is truncated: 0 bytes, its header promises 8"), "{error}");
    let error = TensorFile::open(folder.path().join("none")).err().unwrap();
    assert!(error.to_string().contains("No such file"), "{error}");
}

/// Replaces `from` by `to` (of equal length) in the header.
fn tampered(from: &str, to: &str) -> Result<TensorFile, TensorFileError> {
    assert_eq!(from.len(), to.len());
    let mut bytes = encode(&sample(), &metadata()).unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    TensorFile::from_bytes("tampered", bytes)
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    for (from, to) in [
        ("\"F32\"", "\"F64\""),
        ("[5,3]", "[5,4]"),
        ("[5,3]", "[5,\"]"),
        ("\"shape\"", "\"shame\""),
        ("\"F32\"", "\"X32\""),
        ("{\"__meta", "[\"__meta"),
        ("[8,68]", "[0,60]"),
    ] {
        let error = tampered(from, to).err().unwrap_or_else(|| panic!("{from} -> {to} was taken"));
        assert!(error.to_string().contains("tampered"), "{error}");
    }
    let mut longer = encode(&sample(), &metadata()).unwrap();
    longer.push(0);
    assert!(TensorFile::from_bytes("longer", longer).is_err());
    let huge = [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat();
    let error = TensorFile::from_bytes("huge", huge).err().unwrap();
    assert!(error.to_string().contains("a header of"), "{error}");
}

#[test]
fn elements_that_cannot_be_computed_with_are_carried_but_not_loaded() {
    let data = [1u8, 2, 3, 4];
    let raw = Content::Raw { dtype: safetensors::Dtype::F8_E4M3, shape: vec![4], data: &data };
    let bytes =
        encode_contents(&BTreeMap::from([("q".to_owned(), raw)]), &Metadata::new()).unwrap();
    let file = TensorFile::from_bytes("fp8", bytes).unwrap();
    assert_eq!(file.raw("q").unwrap().1, data);
    let error = file.load("q", Device::Cpu).unwrap_err();
    assert_eq!(
        error.to_string(),
        "fp8: tensor `q` has elements of type F8_E4M3, which cannot be computed with"
    );
}

#[test]
fn split_files_are_read_through_their_index() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = sample();
    let contents = || tensors.iter().map(|(n, t)| (n.clone(), Content::Tensor(t))).collect();
    let whole = write_sharded(folder.path().join("one"), "model", contents(), &metadata(), 1 << 20)
        .unwrap();
    assert_eq!(whole.len(), 1);
    let split = folder.path().join("many");
    let paths = write_sharded(&split, "model", contents(), &metadata(), 16).unwrap();
    assert!(paths.len() > 3);
    for place in ["one", "many"] {
        let file = ShardedFile::open(folder.path().join(place), "model").unwrap();
        assert_eq!(file.load_all(Device::Cpu).unwrap(), sample());
    }
    // A shard that is gone, and an index that points outside its folder, are named.
    let index = split.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::remove_file(&paths[0]).unwrap();
    let error = ShardedFile::open(&split, "model").err().unwrap();
    assert!(error.to_string().contains("model-00001-of-"), "{error}");
    fs::write(&index, text.replace("model-00001", "../model-00001")).unwrap();
    let error = ShardedFile::open(&split, "model").err().unwrap();
    assert!(error.to_string().contains("is not the name of a file beside it"), "{error}");
}

proptest! {
    /// Any bytes at all: an error or a file, never a panic.
    #[test]
    fn rubbish_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0usize..400, value: u8) {
        let _ = TensorFile::from_bytes("rubbish", bytes.clone());
        let mut good = encode(&sample(), &metadata()).unwrap();
        let len = good.len();
        good[at % len] = value;
        if let Ok(file) = TensorFile::from_bytes("flipped", good) {
            let _ = file.load_all(Device::Cpu);
        }
        bytes.splice(0..0, (bytes.len() as u64).to_le_bytes());
        let _ = TensorFile::from_bytes("framed", bytes);
    }
}

/// A file that holds these pieces.
fn file_of(label: &str, pieces: Vec<Piece>) -> TensorFile {
    let mut metadata = metadata();
    let tensors = lay_pieces(pieces, &mut metadata).unwrap();
    TensorFile::from_bytes(label, encode(&tensors, &metadata).unwrap()).unwrap()
}

fn part(name: &str, whole: &Tensor, range: std::ops::Range<i64>) -> Piece {
    let flat = whole.reshape([-1]).narrow(0, range.start, range.end - range.start);
    Piece::part(name, &whole.size(), range, flat)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However tensors are cut and whoever writes the pieces: the same tensors are read.
    #[test]
    fn pieces_make_up_what_was_cut(
        cuts in prop::collection::vec((0i64..=30, 0usize..3), 0..8),
        owner in 0usize..3,
        asked in (0i64..=30, 0i64..=30),
    ) {
        let whole = Tensor::arange(30, (Kind::Float, Device::Cpu)).view([5, 6]);
        let half = whole.to_kind(Kind::BFloat16);
        let mut at: Vec<i64> = cuts.iter().map(|(at, _)| *at).chain([0, 30]).collect();
        at.sort_unstable();
        let mut ranks: Vec<Vec<Piece>> = vec![Vec::new(), Vec::new(), Vec::new()];
        for (n, cut) in at.windows(2).enumerate() {
            let rank = cuts.get(n).map_or(0, |(_, rank)| *rank);
            ranks[rank].push(part("cut", &whole, cut[0]..cut[1]));
            ranks[2 - rank].push(part("half[0]", &half, cut[0]..cut[1]));
        }
        ranks[owner].push(Piece::whole("whole", whole.shallow_clone()));
        ranks[owner].push(Piece::whole("none", Tensor::zeros([0, 2], (Kind::Int64, Device::Cpu))));
        ranks[owner].push(Piece::whole("scalar", Tensor::from(2.5f64)));
        let files = ranks.into_iter().map(|pieces| file_of("shard", pieces)).collect();
        let state = Assembly::new(files).unwrap();
        let names: Vec<&str> = state.names().collect();
        prop_assert_eq!(names, ["cut", "half[0]", "none", "scalar", "whole"]);
        prop_assert_eq!(state.load("cut").unwrap(), whole.shallow_clone());
        prop_assert_eq!(state.load("half[0]").unwrap(), half);
        prop_assert_eq!(state.load_all().unwrap()["whole"].size(), [5, 6]);
        prop_assert_eq!(state.load("none").unwrap().size(), [0, 2]);
        let strided = Tensor::zeros([6, 5], (Kind::Float, Device::Cpu)).transpose(0, 1);
        let plain = Tensor::zeros([5, 6], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        for into in [strided, plain] {
            state.copy_into("cut", &into).unwrap();
            prop_assert_eq!(into.detach(), whole.shallow_clone());
        }
        prop_assert!(state.copy_into("cut", &whole.view([30])).is_err());
        let (start, end) = (asked.0.min(asked.1), asked.0.max(asked.1));
        let piece = state.load_range("cut", start..end).unwrap();
        prop_assert_eq!(piece, whole.reshape([-1]).narrow(0, start, end - start));
    }
}

#[test]
fn pieces_that_do_not_make_up_a_tensor_are_refused_by_name() {
    let whole = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([3, 4]);
    let read = |pieces: Vec<Vec<Piece>>| {
        let files = pieces.into_iter().map(|pieces| file_of("shard-1", pieces)).collect();
        Assembly::new(files).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let cut = |range| part("llm/adamw/w.exp_avg", &whole, range);
    let all = || Piece::whole("llm/adamw/w.exp_avg", whole.shallow_clone());
    assert_eq!(read(vec![vec![cut(0..5)], vec![cut(5..12)]]), "");
    for (pieces, reason) in [
        (vec![vec![cut(0..5)]], "elements 5..12 are missing"),
        (vec![vec![cut(2..12)]], "elements 0..2 are missing"),
        (vec![vec![cut(0..5)], vec![cut(7..12)]], "elements 5..7 are missing"),
        (vec![vec![cut(0..6)], vec![cut(5..12)]], "pieces overlap at element 5"),
        (vec![vec![cut(0..12)], vec![cut(0..12)]], "pieces overlap at element 0"),
        (vec![vec![all()], vec![cut(3..4)]], "pieces overlap at element 3"),
        (vec![vec![all()], vec![all()]], "pieces overlap at element 0"),
        (
            vec![vec![cut(0..5)], vec![part("llm/adamw/w.exp_avg", &whole.view([12]), 5..12)]],
            "one piece says",
        ),
    ] {
        let error = read(pieces);
        assert!(error.contains("`llm/adamw/w.exp_avg`"), "{error}");
        assert!(error.contains(reason), "{error}, expected: {reason}");
    }
    let lay = |piece| lay_pieces([piece], &mut Metadata::new()).unwrap_err().to_string();
    assert!(lay(Piece::part("w", &[3], 1..4, whole.view([12]))).contains("not within"));
    assert!(lay(Piece::part("w", &[12], 0..4, whole.view([12]))).contains("has shape"));
    assert!(lay(Piece::whole("w[0..2]", whole.view([12]))).contains("its name ends"));
    let twice = [cut(0..5), cut(0..5)];
    assert!(lay_pieces(twice, &mut Metadata::new()).unwrap_err().to_string().contains("twice"));
    // A file that does not say what the piece is of.
    let bare = [("w[0..5]".to_owned(), whole.view([12]).narrow(0, 0, 5))].into();
    let bare = TensorFile::from_bytes("x", encode(&bare, &Metadata::new()).unwrap()).unwrap();
    assert!(Assembly::new(vec![bare]).err().unwrap().to_string().contains("whole tensor's shape"));
}
