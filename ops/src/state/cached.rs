//! What the state machine asks of a tensor.

/// A cached tensor: a cheap handle, such as an `Arc`.
pub trait Cached: Clone + Send + Sync + 'static {
    /// Whether it may be served. Asked when a run begins; a tensor that is written in the background may only then be known
    /// to hold NaN or infinity.
    fn is_sound(&self) -> bool {
        true
    }
}
