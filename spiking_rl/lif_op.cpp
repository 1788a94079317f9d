/* The scan from rest as an operation of torch's own: what most of training is, with no Python between two convolutions.
 *
 * It does what fused_fresh.py does, with the same loops (lif_scan.c, whose addresses it is given), so the same bits.
 * There the layout of tensors is worked out, once per layer; here it is compared with what the layer had the last time.
 * What is not plain (another layout, subclasses, modes and transforms that look at tensors) is left to fused_fresh.py.
 */
#define PY_SSIZE_T_CLEAN
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <Python.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t SIZES = 12; /* of Shape in lif_scan.c */

using Forward = int(const int64_t *shape, const float *leak, const float *threshold, const float *keep,
                    const void *current, const float *before, void *spikes, float *potentials, float *after);
using Backward = int(const int64_t *shape, const float *leak, const float *threshold, const float *keep, float gamma,
                     const void *current, const float *before, const void *by_spikes, const float *by_potentials,
                     const float *by_after, void *of_current, float *of_before, float *of_leak, float *of_threshold);

/* How a layer's last scan went: what was given, and what follows from it. */
struct Way : torch::CustomClassHolder {
  std::vector<int64_t> sizes, strides, leak, threshold; /* of the current; of the parameters */
  at::ScalarType stored;
  int64_t timesteps, repeat;
  int threads;
  std::vector<int64_t> frames, packed; /* sizes and strides of the spikes */
  int64_t shape[SIZES];
  Forward *forward;
  Backward *backward;
};

using Held = c10::intrusive_ptr<Way>;

void check(int done) {
  if (!done) throw std::bad_alloc();
}

const float *parameter(const Tensor &tensor) { return tensor.const_data_ptr<float>(); }

/* Of one timestep no leak is read: the threshold stands in for it, as the sizes say. */
const float *leak_or(const Tensor &leak, const Tensor &threshold) {
  return parameter(leak.defined() ? leak : threshold);
}

Tensor fire(const Way &way, const Tensor &current, const Tensor &leak, const Tensor &threshold, bool inside) {
  Tensor spikes = inside               ? current /* every current is read once, just before its spike is written */
                  : way.timesteps == 1 ? at::empty_like(current)
                                       : at::empty_strided(way.frames, way.packed, current.options());
  check(way.forward(way.shape, leak_or(leak, threshold), parameter(threshold), nullptr, current.const_data_ptr(),
                    nullptr, spikes.mutable_data_ptr(), nullptr, nullptr));
  return spikes;
}

/* Whether nobody but the backward pass holds a gradient, or its memory, so that it may be written over. Memory that is
 * not torch's own (an array's) is held by others, who are not counted. */
bool held_alone(const Tensor &grad) {
  return grad.use_count() == 1 && grad.storage().use_count() == 1 && grad.storage().resizable();
}

void require(const Tensor &tensor, const std::vector<int64_t> &sizes) {
  TORCH_CHECK(tensor.is_cpu() && tensor.sizes() == at::IntArrayRef(sizes), "a scan on a CPU of sizes ",
              at::IntArrayRef(sizes), " was given ", tensor.sizes(), " on ", tensor.device());
}

/* A tensor of these sizes, as it lies in memory when it is asked for: hooks may hand back another layout or type. */
Tensor laid(const Tensor &tensor, const std::vector<int64_t> &sizes, const std::vector<int64_t> &strides,
            at::ScalarType type) {
  require(tensor, sizes);
  if (tensor.scalar_type() == type && tensor.strides() == at::IntArrayRef(strides) && !tensor.is_neg()) return tensor;
  return at::empty_strided(sizes, strides, tensor.options().dtype(type)).copy_(tensor.detach());
}

Tensor laid(const Tensor &parameter, const std::vector<int64_t> &sizes) {
  require(parameter, sizes);
  return parameter.to(at::kFloat).resolve_neg().contiguous();
}

/* The gradients of current, leak and threshold, themselves differentiable, which fused_fresh.py knows. */
variable_list differentiable(const Tensor &current, const Tensor &leak, const Tensor &threshold, double gamma,
                             const Way &way, const Tensor &grad) {
  const auto wrapped = [](const Tensor &tensor) { return THPObjectPtr(THPVariable_Wrap(tensor)); };
  const pybind11::gil_scoped_acquire python;
  THPObjectPtr module(PyImport_ImportModule("spiking_rl.fused_fresh"));
  if (!module) throw python_error();
  THPObjectPtr of(wrapped(current)), leaking(wrapped(leak)), limits(wrapped(threshold)), arriving(wrapped(grad));
  THPObjectPtr found(PyObject_CallMethod(module.get(), "differentiable_fresh", "OOOdLLO", of.get(), leaking.get(),
                                               limits.get(), gamma, (long long)way.timesteps, (long long)way.repeat,
                                               arriving.get()));
  if (!found) throw python_error();
  variable_list grads(5); /* gamma and the way have none */
  for (int i = 0; i < 3; i++) {
    PyObject *part = PyTuple_GetItem(found.get(), i);
    if (!part) throw python_error();
    if (part != Py_None) grads[i] = THPVariable_Unpack(part);
  }
  return grads;
}

struct Scan : torch::autograd::Function<Scan> {
  static Tensor forward(AutogradContext *ctx, const Tensor &current, const std::optional<Tensor> &leak,
                        const Tensor &threshold, double gamma, const Held &way) {
    const Tensor leaking = leak.value_or(Tensor());
    ctx->save_for_backward({current, leaking, threshold});
    ctx->saved_data["gamma"] = gamma;
    ctx->saved_data["way"] = c10::IValue::make_capsule(way);
    return fire(*way, current, leaking, threshold, false);
  }

  /* Torch hands over its own list: a copy would hold every gradient once more. */
  static variable_list backward(AutogradContext *ctx, variable_list &grads) {
    const auto held = ctx->saved_data["way"].toCapsule();
    const Way &way = static_cast<const Way &>(*held);
    const auto saved = ctx->get_saved_variables();
    require(grads[0], way.frames);
    if (at::GradMode::is_enabled()) /* somebody may be going to ask for second derivatives */
      return differentiable(saved[0], saved[1], saved[2], ctx->saved_data["gamma"].toDouble(), way, grads[0]);
    const Tensor current = laid(saved[0], way.sizes, way.strides, way.stored);
    const Tensor threshold = laid(saved[2], way.threshold);
    const Tensor leak = saved[1].defined() ? laid(saved[1], way.leak) : Tensor();
    bool inside = held_alone(grads[0]);
    const Tensor given = std::move(grads[0]), arriving = laid(given, way.frames, way.packed, way.stored);
    inside = inside || !arriving.is_same(given);
    /* Every gradient is read just before the one that leaves is written; of a current that lasts there are fewer. */
    Tensor of_current = inside && way.repeat == 1 ? arriving : at::empty_like(current);
    Tensor of_threshold = at::empty(threshold.sizes(), threshold.options());
    Tensor of_leak = leak.defined() ? at::empty(leak.sizes(), leak.options()) : Tensor();
    check(way.backward(way.shape, leak_or(leak, threshold), parameter(threshold), nullptr,
                       float(ctx->saved_data["gamma"].toDouble()), current.const_data_ptr(), nullptr,
                       arriving.const_data_ptr(), nullptr, nullptr, of_current.mutable_data_ptr(), nullptr,
                       of_leak.defined() ? of_leak.mutable_data_ptr<float>() : nullptr,
                       of_threshold.mutable_data_ptr<float>()));
    return {of_current, of_leak, of_threshold, Tensor(), Tensor()}; /* gamma and the way have none */
  }
};

/* Whether somebody looks at what happens to tensors, and has to be shown. */
bool watched() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::dispatch_mode_enabled() || at::impl::torch_function_mode_enabled() ||
         at::tracer::impl::is_dispatch_enabled();
}

bool is(const Tensor &tensor, at::ScalarType type) {
  const auto odd = c10::DispatchKeySet({c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor,
                                        c10::DispatchKey::Functionalize, c10::DispatchKey::Python});
  return tensor.defined() && tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.has_storage() &&
         tensor.scalar_type() == type && !tensor.key_set().has_any(odd);
}

bool fits(const Way &way, const Tensor &current, const Tensor &leak, const Tensor &threshold) {
  const auto given = [](const Tensor &parameter, const std::vector<int64_t> &sizes) {
    return is(parameter, at::kFloat) && parameter.sizes() == at::IntArrayRef(sizes) && parameter.is_contiguous();
  };
  return is(current, way.stored) && current.sizes() == at::IntArrayRef(way.sizes) &&
         current.strides() == at::IntArrayRef(way.strides) && given(threshold, way.threshold) &&
         (way.timesteps == 1 || given(leak, way.leak)) && at::get_num_threads() == way.threads && !watched();
}

/* Lets other threads run Python. */
struct Released {
  PyThreadState *state = PyEval_SaveThread();
  ~Released() { PyEval_RestoreThread(state); }
};

struct PyWay {
  PyObject_HEAD Held way;
};

/* way.spikes(current, leak, threshold, timesteps, repeat, gamma, spare): spikes, or None where this is another case. */
PyObject *spikes(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 7) return PyErr_Format(PyExc_TypeError, "7 arguments are taken, not %zd", count);
  for (int i = 0; i < 3; i++)
    if (!THPVariable_CheckExact(given[i])) Py_RETURN_NONE;
  const Held way = reinterpret_cast<PyWay *>(self)->way;
  const Tensor &current = THPVariable_Unpack(given[0]), &leak = THPVariable_Unpack(given[1]),
               &threshold = THPVariable_Unpack(given[2]);
  const int64_t timesteps = PyLong_AsLongLong(given[3]), repeat = PyLong_AsLongLong(given[4]);
  const double gamma = PyFloat_AsDouble(given[5]);
  const int spare = PyObject_IsTrue(given[6]);
  if (PyErr_Occurred()) return nullptr;
  if (timesteps != way->timesteps || repeat != way->repeat || !fits(*way, current, leak, threshold)) Py_RETURN_NONE;
  const Tensor leaking = timesteps == 1 ? Tensor() : leak;
  Tensor found;
  try {
    const Released others_go_on;
    const std::optional<Tensor> leaks = leaking.defined() ? std::optional<Tensor>(leaking) : std::nullopt;
    found = at::GradMode::is_enabled() ? Scan::apply(current, leaks, threshold, gamma, way)
                                       : fire(*way, current, leaking, threshold, spare && repeat == 1);
  } catch (const std::bad_alloc &) {
    PyErr_SetString(PyExc_MemoryError, "no memory for a scan");
    return nullptr;
  }
  return THPVariable_Wrap(std::move(found));
  END_HANDLE_TH_ERRORS
}

std::vector<int64_t> integers(PyObject *tuple) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++)
    found.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
  return found;
}

PyObject *new_way(PyTypeObject *type, PyObject *arguments, PyObject *) {
  HANDLE_TH_ERRORS
  PyObject *tuples[6];
  const char *shape;
  Py_ssize_t bytes;
  int half, threads;
  long long timesteps, repeat;
  unsigned long long forward, backward;
  auto tuple = &PyTuple_Type;
  if (!PyArg_ParseTuple(arguments, "O!O!O!O!O!O!pLLiy#KK", tuple, &tuples[0], tuple, &tuples[1], tuple, &tuples[2],
                        tuple, &tuples[3], tuple, &tuples[4], tuple, &tuples[5], &half, &timesteps, &repeat, &threads,
                        &shape, &bytes, &forward, &backward))
    return nullptr;
  auto way = c10::make_intrusive<Way>();
  if (bytes != sizeof way->shape) return PyErr_Format(PyExc_ValueError, "the loops' sizes take %zd bytes", bytes);
  way->sizes = integers(tuples[0]);
  way->strides = integers(tuples[1]);
  way->leak = integers(tuples[2]);
  way->threshold = integers(tuples[3]);
  way->frames = integers(tuples[4]);
  way->packed = integers(tuples[5]);
  if (PyErr_Occurred()) return nullptr;
  way->stored = half ? at::kBFloat16 : at::kFloat;
  way->timesteps = timesteps;
  way->repeat = repeat;
  way->threads = threads;
  std::memcpy(way->shape, shape, sizeof way->shape);
  way->forward = reinterpret_cast<Forward *>(forward);
  way->backward = reinterpret_cast<Backward *>(backward);
  PyObject *made = type->tp_alloc(type, 0);
  if (made) new (&reinterpret_cast<PyWay *>(made)->way) Held(std::move(way));
  return made;
  END_HANDLE_TH_ERRORS
}

void free_way(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  reinterpret_cast<PyWay *>(self)->way.~Held();
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef methods[] = {{"spikes", reinterpret_cast<PyCFunction>(spikes), METH_FASTCALL, nullptr}, {}};

PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void *>(new_way)},
                       {Py_tp_dealloc, reinterpret_cast<void *>(free_way)},
                       {Py_tp_methods, methods},
                       {}};

PyType_Spec spec = {"spiking_rl._lif_op.Way", sizeof(PyWay), 0, Py_TPFLAGS_DEFAULT, slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_lif_op", nullptr, -1, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__lif_op() {
  PyObject *module = PyModule_Create(&definition), *type = module ? PyType_FromSpec(&spec) : nullptr;
  if (!type || PyModule_AddObjectRef(module, "Way", type) < 0) Py_CLEAR(module);
  Py_XDECREF(type);
  return module;
}
