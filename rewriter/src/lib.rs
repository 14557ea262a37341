//! Rewrites exported ONNX diffusion transformers so that their self-attention runs through the stateful ops of
//! `libditfastattn`.
//!
//! The data's way: [`onnx`] reads a file without losing a byte; [`shapes`] works out what is known about every value;
//! [`find`] recognises self-attention by dataflow and never changes anything; [`lower`] turns what was found into a patch
//! of the graph; [`cli`] is the `dfa-rewrite` command. Knows neither the kernels nor the ops' insides: the ops' graph
//! contract is all they share.

#![forbid(unsafe_code)]

pub mod account;
pub mod cli;
mod digest;
pub mod find;
pub mod lower;
pub mod onnx;
pub mod report;
pub mod run;
pub mod shapes;
pub mod sizes;
