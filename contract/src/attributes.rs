//! Names of the operators' attributes.

/// Of the step op, and of each op with explicit state: the [version](crate::version) that it was written for (int).
pub const CONTRACT: &str = "contract";

/// Of the step op.
pub mod step {
    /// How many layers there are (int).
    pub const LAYERS: &str = "layers";
    /// The plan file (string).
    pub const PLAN: &str = "plan";
    /// Layers of which only the attention core was replaced (ints).
    pub const CORE_LAYERS: &str = "core_layers";
    /// Layers that keep the exporter's attention beside the op (ints). Since version 2.
    pub const DENSE_LAYERS: &str = "dense_layers";
    /// `any`: timesteps of other schedules are served too (string). Since version 3.
    pub const SCHEDULE: &str = "schedule";
    pub const SCHEDULE_ANY: &str = "any";
    /// 1: the model has inputs that the op is not shown (int). Since version 3.
    pub const BLIND: &str = "blind";
    /// 1: the graph makes guidance's halves of each row that is fed (int). A library that does not know it computes more.
    pub const HALVES_IN_GRAPH: &str = "halves_in_graph";
}

/// Of the ops of a layer.
pub mod layer {
    /// Which layer (int).
    pub const LAYER: &str = "layer";
    /// Which of the module's results the op stands for, and of how many (ints).
    pub const SINK: &str = "sink";
    pub const SINKS: &str = "sinks";
    /// Leading rows of the result for each of the input (int).
    pub const FOLD: &str = "fold";
}

/// Of the attention op.
pub mod attention {
    /// Factor on q·kᵀ; 0: 1/√head_dim (float).
    pub const SCALE: &str = "scale";
    /// `module` or `core` (string).
    pub const FORM: &str = "form";
    pub const FORM_MODULE: &str = "module";
    pub const FORM_CORE: &str = "core";
    /// The order of the axes, a letter each (strings).
    pub const Q_LAYOUT: &str = "q_layout";
    pub const K_LAYOUT: &str = "k_layout";
    pub const V_LAYOUT: &str = "v_layout";
    pub const O_LAYOUT: &str = "o_layout";
    /// 1: rows that see nothing give 0 (int).
    pub const MASK_GUARD: &str = "mask_guard";
    /// Text tokens, where they are known (int), and their side, `start` or `end` (string).
    pub const TEXT: &str = "text";
    pub const TEXT_SIDE: &str = "text_side";
    pub const SIDE_START: &str = "start";
    pub const SIDE_END: &str = "end";
    /// 0: the layer's sequence has no text, whatever the plan says (int).
    pub const JOINT: &str = "joint";
}

/// Of each op of a graph that carries the state.
pub mod state {
    /// `io` (string).
    pub const STATE: &str = "state";
    pub const STATE_IO: &str = "io";
    /// The plan's window, in decimal (string), and guidance (string).
    pub const WINDOW: &str = "window";
    pub const CFG: &str = "cfg";
}
