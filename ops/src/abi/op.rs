//! The table of callbacks that ONNX Runtime calls for one operator, filled from a Rust type.
//!
//! Owns the life of kernel objects: made in `CreateKernelV2`, shared by every thread that computes, freed in
//! `KernelDestroy`. Kernels get `&self`: ONNX Runtime runs one kernel from many threads at once.

use std::ffi::{CStr, c_char, c_int, c_void};

use ort_sys::{
    ONNXTensorElementDataType, OrtApi, OrtCustomOp, OrtCustomOpInputOutputCharacteristic,
    OrtKernelContext, OrtKernelInfo, OrtMemType, OrtStatusPtr,
};

use super::error::Error;
use super::host::Host;
use super::kernel_context::KernelContext;
use super::kernel_info::KernelInfo;
use super::preallocated_status;
use super::status::{caught, guard};

/// What computes a node.
pub trait Kernel: Send + Sync + Sized + 'static {
    /// Reads and checks the node's attributes.
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error>;

    /// Computes the node once. Runs concurrently with itself.
    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error>;
}

/// Type of an input or output. `Any` accepts every tensor type.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    F32,
    F16,
    BF16,
    I64,
    Bool,
    Any,
}

impl Type {
    fn raw(self) -> ONNXTensorElementDataType {
        use ONNXTensorElementDataType as D;
        match self {
            Type::F32 => D::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
            Type::F16 => D::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
            Type::BF16 => D::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
            Type::I64 => D::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
            Type::Bool => D::ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,
            Type::Any => D::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED,
        }
    }
}

/// How often an input or output occurs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Characteristic {
    Required,
    Optional,
    /// Any number from one on, each of its own type; must be the last one.
    Variadic,
}

impl Characteristic {
    fn raw(self) -> OrtCustomOpInputOutputCharacteristic {
        use OrtCustomOpInputOutputCharacteristic as C;
        match self {
            Characteristic::Required => C::INPUT_OUTPUT_REQUIRED,
            Characteristic::Optional => C::INPUT_OUTPUT_OPTIONAL,
            Characteristic::Variadic => C::INPUT_OUTPUT_VARIADIC,
        }
    }
}

/// Where an input lies when the kernel gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemType {
    /// The provider's: host memory for the CPU provider, device memory for CUDA.
    Default,
    /// Host memory, whatever the provider.
    CpuInput,
}

impl MemType {
    fn raw(self) -> OrtMemType {
        match self {
            MemType::Default => OrtMemType::OrtMemTypeDefault,
            MemType::CpuInput => OrtMemType::OrtMemTypeCPUInput,
        }
    }
}

/// One input of an operator.
#[derive(Clone, Copy, Debug)]
pub struct OperatorInput {
    ty: Type,
    characteristic: Characteristic,
    memory: MemType,
}

impl OperatorInput {
    pub const fn required(ty: Type) -> Self {
        OperatorInput::of(ty, Characteristic::Required)
    }

    pub const fn optional(ty: Type) -> Self {
        OperatorInput::of(ty, Characteristic::Optional)
    }

    pub const fn variadic(ty: Type) -> Self {
        OperatorInput::of(ty, Characteristic::Variadic)
    }

    const fn of(ty: Type, characteristic: Characteristic) -> Self {
        OperatorInput {
            ty,
            characteristic,
            memory: MemType::Default,
        }
    }

    /// The same input, read in host memory.
    pub const fn on_host(self) -> Self {
        OperatorInput {
            memory: MemType::CpuInput,
            ..self
        }
    }
}

/// One output of an operator, always in the provider's memory.
#[derive(Clone, Copy, Debug)]
pub struct OperatorOutput {
    ty: Type,
    characteristic: Characteristic,
}

impl OperatorOutput {
    pub const fn required(ty: Type) -> Self {
        OperatorOutput {
            ty,
            characteristic: Characteristic::Required,
        }
    }

    pub const fn optional(ty: Type) -> Self {
        OperatorOutput {
            ty,
            characteristic: Characteristic::Optional,
        }
    }

    pub const fn variadic(ty: Type) -> Self {
        OperatorOutput {
            ty,
            characteristic: Characteristic::Variadic,
        }
    }
}

/// The static face of an operator. Registrations of one name may differ in types only.
#[derive(Debug)]
pub struct Spec {
    pub name: &'static CStr,
    pub inputs: &'static [OperatorInput],
    pub outputs: &'static [OperatorOutput],
    /// The execution provider that the kernels run on; `None` is the CPU provider.
    pub provider: Option<&'static CStr>,
}

impl Spec {
    fn display_name(&self) -> &'static str {
        self.name.to_str().unwrap_or("?")
    }
}

/// An operator as registered with one host. `raw` must stay first: the host gives back pointers to it.
#[repr(C)]
pub(crate) struct Op {
    raw: OrtCustomOp,
    host: Host,
    spec: &'static Spec,
}

/// A kernel with what its callbacks need.
struct Instance<K> {
    host: Host,
    op: &'static str,
    node: String,
    kernel: K,
}

impl Op {
    /// The operator `K` with the face `spec`, for `host`. Leaked: sessions keep pointers to it.
    pub(crate) fn leak<K: Kernel>(host: Host, spec: &'static Spec) -> &'static Op {
        Box::leak(Box::new(Op {
            raw: OrtCustomOp {
                // The version of the fields that are filled here, not of the host.
                version: super::host::MIN_API,
                CreateKernel: None,
                GetName: Some(name),
                GetExecutionProviderType: Some(provider),
                GetInputType: Some(input_type),
                GetInputTypeCount: Some(input_count),
                GetOutputType: Some(output_type),
                GetOutputTypeCount: Some(output_count),
                KernelCompute: None,
                KernelDestroy: Some(destroy::<K>),
                GetInputCharacteristic: Some(input_characteristic),
                GetOutputCharacteristic: Some(output_characteristic),
                GetInputMemoryType: Some(input_memory),
                GetVariadicInputMinArity: Some(min_arity),
                GetVariadicInputHomogeneity: Some(heterogeneous),
                GetVariadicOutputMinArity: Some(min_arity),
                GetVariadicOutputHomogeneity: Some(heterogeneous),
                CreateKernelV2: Some(create::<K>),
                KernelComputeV2: Some(compute::<K>),
                // No shape inference. The rewriter writes types and shapes of all our outputs; the host would only repeat
                // them, and its interface for this is a trap: before 1.24 it dereferences null for a skipped optional
                // input (onnxruntime#26199), 1.24 aborts the process if an output does not exist, and 1.24 and newer
                // contradict the type that value_info gives an output if several element types are registered.
                InferOutputShapeFn: None,
                GetStartVersion: Some(start_version),
                GetEndVersion: Some(end_version),
            },
            host,
            spec,
        }))
    }

    pub(crate) fn raw(&'static self) -> *const OrtCustomOp {
        std::ptr::from_ref(self).cast()
    }
}

/// # Safety
/// `raw` is the pointer from [`Op::raw`], which the host hands back unchanged.
unsafe fn op(raw: *const OrtCustomOp) -> &'static Op {
    // SAFETY: the caller's promise; the pointer was made from the whole `Op`, which is never freed.
    unsafe { &*raw.cast::<Op>() }
}

// Callbacks without a status: they only read the static table and cannot panic for indices that the host takes from
// the counts it was given; `get` keeps a confused host from making them.

unsafe extern "system" fn name(raw: *const OrtCustomOp) -> *const c_char {
    // SAFETY: the host hands back our pointer.
    unsafe { op(raw) }.spec.name.as_ptr()
}

unsafe extern "system" fn provider(raw: *const OrtCustomOp) -> *const c_char {
    // SAFETY: the host hands back our pointer. Null is the CPU provider.
    unsafe { op(raw) }
        .spec
        .provider
        .map_or(std::ptr::null(), CStr::as_ptr)
}

unsafe extern "system" fn input_count(raw: *const OrtCustomOp) -> usize {
    // SAFETY: the host hands back our pointer.
    unsafe { op(raw) }.spec.inputs.len()
}

unsafe extern "system" fn output_count(raw: *const OrtCustomOp) -> usize {
    // SAFETY: the host hands back our pointer.
    unsafe { op(raw) }.spec.outputs.len()
}

/// # Safety
/// As [`op`].
unsafe fn input(raw: *const OrtCustomOp, index: usize) -> OperatorInput {
    // SAFETY: the caller's promise.
    let inputs = unsafe { op(raw) }.spec.inputs;
    let any = OperatorInput::required(Type::Any);
    inputs.get(index).copied().unwrap_or(any)
}

/// # Safety
/// As [`op`].
unsafe fn output(raw: *const OrtCustomOp, index: usize) -> OperatorOutput {
    // SAFETY: the caller's promise.
    let outputs = unsafe { op(raw) }.spec.outputs;
    let any = OperatorOutput::required(Type::Any);
    outputs.get(index).copied().unwrap_or(any)
}

unsafe extern "system" fn input_type(
    raw: *const OrtCustomOp,
    index: usize,
) -> ONNXTensorElementDataType {
    // SAFETY: the host hands back our pointer.
    unsafe { input(raw, index) }.ty.raw()
}

unsafe extern "system" fn output_type(
    raw: *const OrtCustomOp,
    index: usize,
) -> ONNXTensorElementDataType {
    // SAFETY: the host hands back our pointer.
    unsafe { output(raw, index) }.ty.raw()
}

unsafe extern "system" fn input_characteristic(
    raw: *const OrtCustomOp,
    index: usize,
) -> OrtCustomOpInputOutputCharacteristic {
    // SAFETY: the host hands back our pointer.
    unsafe { input(raw, index) }.characteristic.raw()
}

unsafe extern "system" fn output_characteristic(
    raw: *const OrtCustomOp,
    index: usize,
) -> OrtCustomOpInputOutputCharacteristic {
    // SAFETY: the host hands back our pointer.
    unsafe { output(raw, index) }.characteristic.raw()
}

unsafe extern "system" fn input_memory(raw: *const OrtCustomOp, index: usize) -> OrtMemType {
    // SAFETY: the host hands back our pointer.
    unsafe { input(raw, index) }.memory.raw()
}

unsafe extern "system" fn min_arity(_: *const OrtCustomOp) -> c_int {
    1
}

unsafe extern "system" fn heterogeneous(_: *const OrtCustomOp) -> c_int {
    0
}

unsafe extern "system" fn start_version(_: *const OrtCustomOp) -> c_int {
    1
}

unsafe extern "system" fn end_version(_: *const OrtCustomOp) -> c_int {
    c_int::MAX
}

unsafe extern "system" fn create<K: Kernel>(
    raw: *const OrtCustomOp,
    _: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    // SAFETY: the host hands back our pointer.
    let op = unsafe { op(raw) };
    guard(&op.host, || {
        // SAFETY: the info lives during this call.
        let info = unsafe { KernelInfo::new(&op.host, info) };
        let node = info.node_name();
        let name = op.spec.display_name();
        let made = caught(|| {
            let made = K::create(&info);
            info.settle()?;
            made
        });
        let made = made.map_err(|error| error.at(name, &node))?;
        let instance = Box::new(Instance {
            host: op.host,
            op: name,
            node,
            kernel: made,
        });
        // SAFETY: a place for the answer, given by the host.
        unsafe { kernel.write(Box::into_raw(instance).cast()) };
        Ok(())
    })
}

unsafe extern "system" fn compute<K: Kernel>(
    kernel: *mut c_void,
    context: *mut OrtKernelContext,
) -> OrtStatusPtr {
    // SAFETY: made by `create::<K>`, alive until `destroy::<K>`; shared by threads, hence only `&`.
    let instance = unsafe { &*kernel.cast_const().cast::<Instance<K>>() };
    preallocated_status::refill(&instance.host);
    guard(&instance.host, || {
        // SAFETY: the context lives during this call.
        let context = unsafe { KernelContext::new(&instance.host, context) };
        caught(|| instance.kernel.compute(&context))
            .map_err(|error| error.at(instance.op, &instance.node))
    })
}

unsafe extern "system" fn destroy<K: Kernel>(kernel: *mut c_void) {
    // There is no status to return: a panic in a destructor is reported by the panic hook and goes no further.
    let _ = caught(|| {
        // SAFETY: made by `create::<K>`; the host destroys each kernel once, when no thread computes with it.
        drop(unsafe { Box::from_raw(kernel.cast::<Instance<K>>()) });
        Ok(())
    });
}
