// What layers/nodes.py does, for the CPU: the same mathematics, in one pass over the window each way.
//
// Float and double in one memory layout are read here; whatever else comes (second derivatives, batches of cotangents,
// half precision) goes through the operators of torch.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <memory>
#include <mutex>

namespace {

using at::Tensor;
using torch::autograd::variable_list;

// Elements that a thread takes at a time, so that windows of more than four states stay in the first cache.
constexpr int64_t kPiece = 1024;
// Elements below which another thread costs more than it brings, as in the operators of torch.
constexpr int64_t kGrain = 32768;

// One binary for every machine: the loader picks the widest vectors that it has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_MACHINE __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define FOR_EACH_MACHINE
#endif

// out = x + sum_k weights[k] * states[k], four states at a time
#define DEFINE_ADD_STATES(T)                                                                                     \
  FOR_EACH_MACHINE void add_states(T* out, const T* x, const T* const* states, const T* weights, int64_t size) { \
    const T *s0 = states[0], *s1 = states[1], *s2 = states[2], *s3 = states[3];                                  \
    const T w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];                                  \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) {                                                     \
      out[i] = x[i] + w0 * s0[i] + w1 * s1[i] + w2 * s2[i] + w3 * s3[i];                                         \
    }                                                                                                            \
  }
DEFINE_ADD_STATES(float)
DEFINE_ADD_STATES(double)

// The same, and products[k] = <y, states[k]>
#define DEFINE_ADD_STATES_AND_MULTIPLY(T)                                                                    \
  FOR_EACH_MACHINE void add_states_and_multiply(                                                             \
      T* out, T* products, const T* x, const T* y, const T* const* states, const T* weights, int64_t size) { \
    const T *s0 = states[0], *s1 = states[1], *s2 = states[2], *s3 = states[3];                              \
    const T w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];                              \
    T p0 = 0, p1 = 0, p2 = 0, p3 = 0;                                                                        \
    _Pragma("omp simd reduction(+ : p0, p1, p2, p3)") for (int64_t i = 0; i < size; ++i) {                   \
      out[i] = x[i] + w0 * s0[i] + w1 * s1[i] + w2 * s2[i] + w3 * s3[i];                                     \
      p0 += y[i] * s0[i], p1 += y[i] * s1[i], p2 += y[i] * s2[i], p3 += y[i] * s3[i];                        \
    }                                                                                                        \
    products[0] = p0, products[1] = p1, products[2] = p2, products[3] = p3;                                  \
  }
DEFINE_ADD_STATES_AND_MULTIPLY(float)
DEFINE_ADD_STATES_AND_MULTIPLY(double)

template <typename T>
const T kZeros[kPiece] = {};

// The addresses and the weights of tensors in fours; zeros fill up the last.
template <typename T>
struct Fours {
  Fours(at::ArrayRef<Tensor> tensors, at::ArrayRef<double> numbers) : weights(numbers.begin(), numbers.end()) {
    for (const Tensor& tensor : tensors) starts.push_back(tensor.const_data_ptr<T>());
    weights.resize((tensors.size() + 3) / 4 * 4);
  }

  // Calls `use(first, pieces)` for the pieces of each four that begin at element `at`.
  template <typename Use>
  void each(int64_t at, const Use& use) const {
    for (size_t first = 0; first < weights.size(); first += 4) {
      const T* pieces[4];
      for (size_t k = 0; k < 4; ++k) pieces[k] = first + k < starts.size() ? starts[first + k] + at : kZeros<T>;
      use(first, pieces);
    }
  }

  c10::SmallVector<const T*, 8> starts;
  c10::SmallVector<T, 8> weights;
};

// out = branch + sum_k weights[k] * window[k]
template <typename T>
void mix(const Tensor& branch, at::ArrayRef<Tensor> window, at::ArrayRef<double> weights, const Tensor& out) {
  const T* x = branch.const_data_ptr<T>();
  T* y = out.mutable_data_ptr<T>();
  const Fours<T> states(window, weights);
  at::parallel_for(0, branch.numel(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kPiece) {
      const int64_t size = std::min(kPiece, end - at);
      states.each(at, [&](size_t first, const T* const* pieces) {
        add_states(y + at, first ? y + at : x + at, pieces, &states.weights[first], size);
      });
    }
  });
}

using Products = c10::SmallVector<double, 8>;

// out = sum_k weights[k] * cotangents[k]; returns <state, cotangents[k]>, and zeros up to four.
template <typename T>
Products mix_back(
    const Tensor& state, at::ArrayRef<Tensor> cotangents, at::ArrayRef<double> weights, const Tensor& out) {
  const T* x = state.const_data_ptr<T>();
  T* y = out.mutable_data_ptr<T>();
  const Fours<T> window(cotangents, weights);
  return at::parallel_reduce(
      0, state.numel(), kGrain, Products(window.weights.size()),
      [&](int64_t begin, int64_t end, Products products) {
        for (int64_t at = begin; at < end; at += kPiece) {
          const int64_t size = std::min(kPiece, end - at);
          window.each(at, [&](size_t first, const T* const* pieces) {
            T found[4];
            const T* before = first ? y + at : kZeros<T>;
            add_states_and_multiply(y + at, found, before, x + at, pieces, &window.weights[first], size);
            for (size_t k = 0; k < 4; ++k) products[first + k] += found[k];
          });
        }
        return products;
      },
      [](Products left, const Products& right) {
        for (size_t k = 0; k < left.size(); ++k) left[k] += right[k];
        return left;
      });
}

// Whether nothing but memory of the CPU is behind a tensor: no batch, no subclass, no pending negation.
bool dense(const Tensor& tensor) {
  auto keys = tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU);
}

// Whether the numbers of all tensors can be read in the order of `like`, whose dtype they have.
bool readable(at::ArrayRef<Tensor> tensors, const Tensor& like) {
  return (like.scalar_type() == at::kFloat || like.scalar_type() == at::kDouble) && dense(like) &&
      like.is_non_overlapping_and_dense() && std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& tensor) {
           return dense(tensor) && tensor.sizes() == like.sizes() && tensor.strides() == like.strides();
         });
}

// What the nodes share in one backward pass: the last H cotangents, and the inner products found so far.
struct Pass {
  variable_list cotangents;
  std::vector<uint32_t> versions;  // those of the cotangents when they came
  std::vector<double> products;
  variable_list tensors;  // products that operators found, in their places
};

// One forward of a stack of L layers.
struct Nodes : c10::intrusive_ptr_target {
  explicit Nodes(Tensor weights_) : weights(std::move(weights_)), depth(weights.size(0)), width(weights.size(1)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor numbers = weights.to(at::kDouble).contiguous();
    values.assign(numbers.const_data_ptr<double>(), numbers.const_data_ptr<double>() + numbers.numel());
  }

  const Tensor weights;
  const int64_t depth, width;
  std::vector<double> values;
  std::map<int, std::weak_ptr<Pass>> passes;  // of those that run now; a pass that fails must not keep its graph alive
  std::mutex mutex;
};

struct Mix : torch::autograd::Node {
  c10::intrusive_ptr<Nodes> nodes;
  int64_t layer;
  torch::autograd::SavedVariable latest;

  std::string name() const override { return "MixBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    latest.reset_data();
  }

  Tensor unpacked() {
    std::lock_guard<std::mutex> lock(mutex_);
    return latest.unpack();
  }

  // That of the backward pass which runs now. The engine's callback owns it, and is gone when the pass ends or fails.
  std::shared_ptr<Pass> pass() const {
    const int task = torch::autograd::get_current_graph_task_id();
    std::lock_guard<std::mutex> lock(nodes->mutex);
    auto found = nodes->passes[task].lock();
    if (!found) {
      found = std::make_shared<Pass>();
      found->cotangents.resize(nodes->width);
      found->versions.resize(nodes->width);
      found->products.resize(nodes->values.size());
      torch::autograd::Engine::get_default_engine().queue_callback([nodes = nodes, task, found] {
        std::lock_guard<std::mutex> lock(nodes->mutex);
        nodes->passes.erase(task);
      });
      nodes->passes[task] = found;
    }
    return found;
  }

  variable_list apply(variable_list&& gradients) override {
    const int64_t width = nodes->width;
    const Tensor state = unpacked();
    const bool wants_state = task_should_compute_output(1), wants_weights = task_should_compute_output(2);
    const auto shared = this->pass();
    Pass& pass = *shared;
    Tensor& own = pass.cotangents[layer % width] = gradients[0];
    // A network often ends in a sum, whose gradient is one number that is seen everywhere.
    const bool in_memory = !at::GradMode::is_enabled() && dense(own);
    if (in_memory && own.strides() != state.strides()) own = at::empty_like(state).copy_(own);
    if (own.defined()) pass.versions[layer % width] = own._version();

    // Layer j mixes the state with weights[j, H - 1 - (j - layer)]. The layers from some j on may have no part in the
    // pass.
    c10::SmallVector<int64_t, 8> places;
    variable_list cotangents;
    for (int64_t j = layer; j < std::min(layer + width, nodes->depth) && pass.cotangents[j % width].defined(); ++j) {
      TORCH_CHECK(
          pass.cotangents[j % width]._version() == pass.versions[j % width],
          "the gradient of layer ", j, " was changed in place, by a hook perhaps; return a new tensor from the hook");
      places.push_back(j * width + width - 1 - (j - layer));
      cotangents.push_back(pass.cotangents[j % width]);
    }
    Tensor of_state, of_weights;
    if (in_memory && readable(cotangents, state)) {
      c10::SmallVector<double, 8> weights;
      for (auto place : places) weights.push_back(nodes->values[place]);
      of_state = at::empty_like(state);
      const auto products = state.scalar_type() == at::kFloat ? mix_back<float>(state, cotangents, weights, of_state)
                                                              : mix_back<double>(state, cotangents, weights, of_state);
      for (size_t k = 0; k < places.size(); ++k) pass.products[places[k]] = products[k];
    } else {
      const Tensor weights = nodes->weights.flatten();
      // What is summed of float16 would leave its range.
      const auto wide = at::promote_types(state.scalar_type(), at::kFloat);
      const Tensor wide_state = state.to(wide);
      if (pass.tensors.empty()) pass.tensors.assign(nodes->values.size(), at::zeros({}, weights.options()));
      for (size_t k = 0; k < places.size(); ++k) {
        const Tensor cotangent = cotangents[k].to(wide);
        const Tensor term = cotangent * weights[places[k]];
        of_state = of_state.defined() ? of_state + term : term;
        pass.tensors[places[k]] = (cotangent * wide_state).sum();
      }
      if (of_state.defined()) of_state = of_state.to(state.scalar_type());
    }
    if (layer == 0 && wants_weights) {
      of_weights = at::tensor(pass.products, nodes->weights.options()).view(nodes->weights.sizes());
      if (!pass.tensors.empty()) of_weights = of_weights + at::stack(pass.tensors).view(nodes->weights.sizes());
    }
    return {gradients[0], wants_state ? of_state : Tensor(), of_weights};
  }
};

// The state that `layer` makes, or nothing if branch and latest state differ in shape, dtype or device.
std::optional<Tensor> mix_layer(
    const c10::intrusive_ptr<Nodes>& nodes, const Tensor& branch, int64_t layer, const variable_list& window) {
  const Tensor& latest = window.back();
  if (branch.sizes() != latest.sizes() || branch.dtype() != latest.dtype() || branch.device() != latest.device())
    return {};
  const int64_t count = window.size();
  TORCH_INTERNAL_ASSERT(layer < nodes->depth && count <= nodes->width);
  const at::ArrayRef<double> weights(nodes->values.data() + (layer + 1) * nodes->width - count, count);
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (readable(window, branch)) {
      out = at::empty_like(branch);
      branch.scalar_type() == at::kFloat ? mix<float>(branch, window, weights, out)
                                         : mix<double>(branch, window, weights, out);
    } else {
      out = at::add(branch, window[0], weights[0]);
      for (int64_t k = 1; k < count; ++k) out.add_(window[k], weights[k]);
    }
  }
  if (torch::autograd::compute_requires_grad(branch, latest, nodes->weights)) {
    auto node = c10::make_intrusive<Mix>();
    node->set_next_edges(torch::autograd::collect_next_edges(branch, latest, nodes->weights));
    node->nodes = nodes;
    node->layer = layer;
    node->latest = torch::autograd::SavedVariable(latest, /*is_output=*/false);
    torch::autograd::set_history(out, node);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  pybind11::class_<Nodes, c10::intrusive_ptr<Nodes>>(module, "Nodes")
      .def(pybind11::init([](const Tensor& weights) { return c10::make_intrusive<Nodes>(weights); }))
      .def("mix", &mix_layer, pybind11::call_guard<pybind11::gil_scoped_release>());
}
