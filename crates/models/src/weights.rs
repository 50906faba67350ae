//! Weight files of one component: one safetensors file, or shards with an index.

use crate::error::{ModelError, Result};
use crate::params::{ParamSet, ParamSpec};
use duet_torch::tensorfile::{self, Content, Metadata, ShardedFile, TensorSource};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Shards are not made larger than this, as transformers does.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Opens `{stem}.safetensors`, or the shards that `{stem}.safetensors.index.json` names.
pub(crate) fn open(folder: &Path, stem: &str) -> Result<ShardedFile> {
    Ok(ShardedFile::open(folder, stem)?)
}

/// Reads the tensors that `specs` call for, each straight to `device` and `kind`.
pub(crate) fn read(
    source: &impl TensorSource,
    specs: &[ParamSpec],
    device: Device,
    kind: Kind,
) -> Result<ParamSet> {
    let mut params = ParamSet::new();
    for spec in specs {
        let Some(found) = source.spec(&spec.name) else {
            return Err(ModelError::MissingTensor {
                origin: source.label().to_owned(),
                name: spec.name.clone(),
                shape: spec.shape.clone(),
            });
        };
        if found.shape != spec.shape {
            return Err(ModelError::WrongShape {
                origin: source.label().to_owned(),
                name: spec.name.clone(),
                got: found.shape,
                want: spec.shape.clone(),
            });
        }
        let read = tensorfile::kind_of(found.dtype).filter(|kind| {
            matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double)
        });
        if read.is_none() {
            return Err(ModelError::WrongKind {
                origin: source.label().to_owned(),
                name: spec.name.clone(),
                got: format!("{:?}", found.dtype),
            });
        }
        params.insert(spec.name.clone(), source.load_as(&spec.name, device, kind)?);
    }
    Ok(params)
}

/// Tensors as contents of a file.
pub(crate) fn contents(tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, Content<'_>> {
    tensors.iter().map(|(name, tensor)| (name.clone(), Content::Tensor(tensor))).collect()
}

/// Writes one file, or shards with an index where it would be large.
pub(crate) fn write(folder: &Path, stem: &str, all: BTreeMap<String, Content<'_>>) -> Result<()> {
    // transformers refuses files whose metadata does not say which framework wrote them.
    let metadata = Metadata::from([("format".to_owned(), "pt".to_owned())]);
    tensorfile::write_sharded(folder, stem, all, &metadata, SHARD_BYTES)?;
    Ok(())
}
