//! Keys of the file's metadata: what tools can read off a rewritten model.

/// The version of the rewriter.
pub const VERSION: &str = "ditfastattn.version";
/// The plan, as a plan file, and its digest.
pub const PLAN: &str = "ditfastattn.plan";
pub const PLAN_SHA256: &str = "ditfastattn.plan_sha256";
/// `io` where the graph carries the state.
pub const STATE: &str = "ditfastattn.state";
