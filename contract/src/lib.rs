//! What a rewritten graph says and the op library reads: the one place where both find it.
//!
//! | module | owns |
//! |---|---|
//! | [`operators`] | the domain, the operators' names, the order of their inputs and outputs |
//! | [`attributes`] | the names of their attributes |
//! | [`version`] | which versions of this contract there are, and what each added |
//! | [`directive`] | the number that tells a layer with explicit state what to do |
//! | [`graph`] | names of the graph's own inputs and outputs |
//! | [`metadata`] | keys of the file's metadata |
//!
//! Owns names and numbers only: no ONNX, no plans, no state. A change here is a new [`version`].

#![forbid(unsafe_code)]

pub mod attributes;
pub mod directive;
pub mod graph;
pub mod metadata;
pub mod operators;
pub mod version;
