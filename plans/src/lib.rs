//! What every attention layer does at every diffusion step: the plan.
//!
//! This crate owns the plan's file format and its checks ([`Plan`]), what a plan implies for the
//! caches that run it ([`Liveness`]), what it saves ([`Cost`]) and how it looks ([`HeatMap`]).
//! It knows nothing of ONNX, of ONNX Runtime or of how attention is computed, and it opens no
//! files: text and bytes go in, text and bytes come out.
//!
//! ```
//! use ditfastattn_plans::{Action, Plan};
//!
//! let plan = Plan::parse(r#"{"format": "ditfastattn-plan", "version": 1,
//!                            "steps": [["full", "full"], ["wa-rs", "ast"]]}"#)?;
//! assert_eq!(plan.action(1, 0), Action::WaRs);
//! // Step 1 of layer 0 reads the residual that step 0 has to leave behind; layer 1 needs none.
//! assert!(plan.liveness().residual_live_after(0, 0));
//! assert!(!plan.liveness().residual_live_after(0, 1));
//! # Ok::<(), ditfastattn_plans::PlanError>(())
//! ```
#![forbid(unsafe_code)]

mod action;
mod cost;
mod error;
mod heatmap;
mod import;
mod liveness;
mod parse;
mod plan;
mod schema;
mod source;
mod write;

pub use action::{Action, UnknownAction};
pub use cost::{Cost, Counts, Workload, band_density};
pub use error::{PlanError, PlanErrorKind};
pub use heatmap::{HeatMap, TooLarge};
pub use liveness::{CacheShape, Liveness, PeakBytes};
pub use parse::MAX_PLAN_BYTES;
pub use plan::{Cfg, DEFAULT_WINDOW, Fingerprint, Plan, Side, TextTokens};
pub use schema::json_schema;
