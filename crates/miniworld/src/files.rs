//! Networks as safetensors files.

use crate::error::{Result, WorldError};
use crate::nets::Net;
use duet_models::params::ParamSet;
use duet_torch::Tensors;
use duet_torch::tensorfile::{TensorFile, TensorSource, encode, write_bytes};
use std::path::Path;
use tch::{Device, Kind};

fn bad(path: &Path, error: &dyn std::fmt::Display) -> WorldError {
    WorldError::BadFile {
        path: path.to_owned(),
        reason: format!("{error}; make the folder anew with `duet-trainer bootstrap`"),
    }
}

/// All tensors of a file, fp32 on the CPU.
pub(crate) fn read_nets(path: &Path) -> Result<ParamSet> {
    let file = TensorFile::open(path).map_err(|error| bad(path, &error))?;
    let names: Vec<String> = file.names().into_iter().map(str::to_owned).collect();
    let tensors = names.into_iter().map(|name| {
        let tensor = file.load_as(&name, Device::Cpu, Kind::Float);
        tensor.map(|tensor| (name, tensor)).map_err(|error| bad(path, &error))
    });
    tensors.collect()
}

/// Networks side by side in one file, told apart by a prefix.
pub(crate) fn write_nets(path: &Path, nets: &[(&str, &Net)]) -> Result<()> {
    let mut all = Tensors::new();
    for (prefix, net) in nets {
        for (name, tensor) in net.params().iter() {
            all.insert(format!("{prefix}{name}"), tensor.shallow_clone());
        }
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|error| WorldError::io(folder, error))?;
    }
    let bytes = encode(&all, &Default::default()).map_err(|error| bad(path, &error))?;
    write_bytes(path, &bytes).map_err(|error| bad(path, &error))
}
