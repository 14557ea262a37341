//! The pickle inside the zip archive that `torch.save` writes.

use std::io::Read;

use flate2::bufread::DeflateDecoder;
use rawzip::{CompressionMethod, ZipArchive};

use crate::parse::MAX_PLAN_BYTES;
use crate::{PlanError, PlanErrorKind};

/// The contents of the archive's one `data.pkl`, checked against its size and checksum.
pub(super) fn pickle(bytes: &[u8]) -> Result<Vec<u8>, PlanError> {
    let archive = ZipArchive::from_slice(bytes).map_err(broken)?;
    let mut found = None;
    let mut entries = archive.entries();
    while let Some(entry) = entries.next_entry().map_err(broken)? {
        let name = entry.file_path();
        let name: &[u8] = name.as_ref();
        if name == b"data.pkl" || name.ends_with(b"/data.pkl") {
            if found.is_some() {
                return Err(wrong("it has more than one data.pkl"));
            }
            found = Some((entry.wayfinder(), entry.compression_method()));
        }
    }
    let (place, method) = found.ok_or_else(|| {
        wrong("it has no data.pkl, so torch.save did not write it; is this the right file?")
    })?;
    let entry = archive.get_entry(place).map_err(broken)?;
    match method {
        CompressionMethod::STORE => contents(&entry, entry.data()),
        CompressionMethod::DEFLATE => contents(&entry, DeflateDecoder::new(entry.data())),
        _ => Err(wrong("its data.pkl is neither stored nor deflated")),
    }
}

/// Inflates no further than a plan is long, whatever size the archive claims.
fn contents(entry: &rawzip::ZipSliceEntry<'_>, data: impl Read) -> Result<Vec<u8>, PlanError> {
    let mut pickle = Vec::new();
    let longest = MAX_PLAN_BYTES as u64 + 1;
    let read = entry
        .verifying_reader(data)
        .take(longest)
        .read_to_end(&mut pickle);
    if pickle.len() > MAX_PLAN_BYTES {
        return Err(wrong(&format!(
            "its data.pkl has more than {MAX_PLAN_BYTES} bytes; a plan does not"
        )));
    }
    read.map_err(|error| wrong(&format!("its data.pkl is damaged: {error}")))?;
    Ok(pickle)
}

fn broken(error: rawzip::Error) -> PlanError {
    wrong(&format!("it is damaged: {error}"))
}

fn wrong(what: &str) -> PlanError {
    PlanError {
        kind: PlanErrorKind::Pickle,
        line: 1,
        column: 1,
        message: format!("the zip archive: {what}"),
    }
}
