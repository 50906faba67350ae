//! Weight files of one component: one safetensors file, or shards with an index.

use crate::error::{ModelError, Result};
use crate::params::ParamSet;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// Shards are not made larger than this, as transformers does.
const SHARD_BYTES: usize = 5_000_000_000;

/// Reads the weights `{stem}.safetensors`, or the shards that `{stem}.safetensors.index.json` names.
pub(crate) fn read_folder(folder: &Path, stem: &str) -> Result<ParamSet> {
    let single = folder.join(format!("{stem}.safetensors"));
    let index = folder.join(format!("{stem}.safetensors.index.json"));
    let mut all = ParamSet::new();
    if single.is_file() {
        read_file(&single, &mut all)?;
        return Ok(all);
    }
    if !index.is_file() {
        let reason = "weights are missing: neither this file nor its index is there";
        return Err(ModelError::bad_file(single, reason));
    }
    let parsed = crate::pipeline::read_json(&index)?;
    let map = parsed.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| ModelError::bad_file(&index, "`weight_map` is missing"))?;
    let mut shards: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    shards.sort_unstable();
    shards.dedup();
    for shard in shards {
        if shard.contains('/') || shard.contains("..") {
            return Err(ModelError::bad_file(
                &index,
                format!("shard `{shard}` is outside of it"),
            ));
        }
        read_file(&folder.join(shard), &mut all)?;
    }
    match map.keys().find(|name| !all.contains(name)) {
        Some(name) => Err(ModelError::bad_file(
            &index,
            format!("tensor `{name}` is in none of the shards it names"),
        )),
        None => Ok(all),
    }
}

/// Adds a file's tensors to `into`, in the file's dtypes, on the CPU.
pub(crate) fn read_file(path: &Path, into: &mut ParamSet) -> Result<()> {
    let bytes = std::fs::read(path).map_err(|error| ModelError::io(path, error))?;
    let bad = |reason: String| ModelError::bad_file(path, reason);
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| bad(format!("not a whole safetensors file: {error}")))?;
    for (name, view) in file.iter() {
        let kind = kind_of(view.dtype())
            .ok_or_else(|| bad(format!("tensor `{name}` has dtype {:?}", view.dtype())))?;
        let shape: Vec<i64> = view.shape().iter().map(|size| *size as i64).collect();
        let tensor = duet_torch::bytes::from_bytes(view.data(), &shape, kind)
            .map_err(|error| bad(format!("tensor `{name}`: {error}")))?;
        into.insert(name, tensor);
    }
    Ok(())
}

/// Writes tensors as one file, or as shards with an index where they are large.
pub(crate) fn write_folder(
    folder: &Path,
    stem: &str,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let mut shards: Vec<BTreeMap<&str, &Tensor>> = vec![BTreeMap::new()];
    let (mut filled, mut total) = (0, 0);
    for (name, tensor) in tensors {
        let size = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if filled > 0 && filled + size > SHARD_BYTES {
            shards.push(BTreeMap::new());
            filled = 0;
        }
        filled += size;
        total += size;
        if let Some(shard) = shards.last_mut() {
            shard.insert(name, tensor);
        }
    }
    if let [only] = shards.as_slice() {
        return write_file(&folder.join(format!("{stem}.safetensors")), only);
    }
    let count = shards.len();
    let mut map = serde_json::Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{count:05}.safetensors", index + 1);
        write_file(&folder.join(&file), shard)?;
        map.extend(shard.keys().map(|name| ((*name).to_owned(), json!(file))));
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    crate::pipeline::write_json(
        &folder.join(format!("{stem}.safetensors.index.json")),
        &index,
    )
}

fn write_file(path: &Path, tensors: &BTreeMap<&str, &Tensor>) -> Result<()> {
    let bad = |reason: String| ModelError::bad_file(path, reason);
    let mut held = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let shape: Vec<usize> = tensor.size().iter().map(|size| *size as usize).collect();
        let dtype = dtype_of(tensor.kind())
            .ok_or_else(|| bad(format!("tensor `{name}` has dtype {:?}", tensor.kind())))?;
        held.push((*name, dtype, shape, duet_torch::bytes::to_bytes(tensor)?));
    }
    let views = held
        .iter()
        .map(|(name, dtype, shape, data)| {
            Ok((*name, TensorView::new(*dtype, shape.clone(), data)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| bad(error.to_string()))?;
    // transformers refuses files whose metadata does not say which framework wrote them.
    let metadata = Some(
        [("format".to_owned(), "pt".to_owned())]
            .into_iter()
            .collect(),
    );
    let bytes = safetensors::serialize(views, metadata).map_err(|error| bad(error.to_string()))?;
    std::fs::write(path, bytes).map_err(|error| ModelError::io(path, error))
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    Some(match kind {
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Double => Dtype::F64,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::BOOL,
        _ => return None,
    })
}
