//! Why an op cannot go on, and lists that say so where there is no memory for them.

/// Why an op cannot go on. It becomes an error of the run, never a wrong tensor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error(
        "the ticket [{0}, {1}] belongs to no run in flight; expected the ticket output of this model's \
         DiTFastAttnStep, computed in the same run"
    )]
    UnknownTicket(i64, i64),
    #[error("layer {layer} is not in the plan, which has {layers} layers")]
    NoSuchLayer { layer: usize, layers: usize },
    #[error(
        "no memory for {what} ({bytes} bytes); give the process more memory, run fewer requests at once, \
         or lower DITFASTATTN_CACHE_BYTES"
    )]
    NoMemory { what: &'static str, bytes: usize },
}

/// An empty list with room for `len`, or an error that names it. For lists that grow with the model or with traffic.
pub fn list<T>(what: &'static str, len: usize) -> Result<Vec<T>, StateError> {
    let mut list = Vec::new();
    list.try_reserve_exact(len)
        .map_err(|_| StateError::no_memory::<T>(what, len))?;
    Ok(list)
}

impl StateError {
    pub(super) fn no_memory<T>(what: &'static str, len: usize) -> Self {
        let bytes = len.saturating_mul(size_of::<T>());
        StateError::NoMemory { what, bytes }
    }
}
