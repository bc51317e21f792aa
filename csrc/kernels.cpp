// dlops._C.kernels: the ops as plain functions for Python, which call them through the dispatcher,
// past its derivatives. What torch.ops does for a call on its way there (a search for
// __torch_function__, a list of values that know their types) takes ten times as long as a small
// kernel; dlops/functional.py has looked for __torch_function__ already.
#include "kernels.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

namespace dlops {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;
using Ints = c10::SymIntArrayRef;
using c10::SymInt;
using One = Tensor;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// Binds the op `name`; the signature is compared with its schema.
template <class Result, class... Args>
void add(pybind11::module_& m, const char* name) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow((std::string("dlops::") + name).c_str(), "")
                      .template typed<Result(Args...)>();
  const auto call = [op](Args... args) -> Result {
    const at::AutoDispatchBelowAutograd guard;
    return op.call(args...);
  };
  m.def(name, torch::wrap_pybind_function_no_gil(call));
}

void add_conv2d(pybind11::module_& m) {
  add<One, const Tensor&, const Tensor&, Optional, Ints, Ints, Ints, SymInt>(m, "conv2d");
  add<One, const Tensor&, const Tensor&, Ints, Ints, Ints, Ints, SymInt>(m, "conv2d_grad_input");
  add<One, const Tensor&, const Tensor&, Ints, Ints, Ints, Ints, SymInt>(m, "conv2d_grad_weight");
  add<One, const Tensor&>(m, "conv2d_grad_bias");
  add<Three, const Tensor&, Optional, Optional, Ints, Ints, Ints, Ints, Ints, SymInt,
      std::array<bool, 3>>(m, "conv2d_backward");
  add<One, const Tensor&, Ints, Ints, Ints, Ints>(m, "unfold");
  add<One, const Tensor&, Ints, Ints, Ints, Ints, Ints>(m, "fold");
}

void add_max_pool2d(pybind11::module_& m) {
  add<Two, const Tensor&, Ints, Ints, Ints, Ints, bool>(m, "max_pool2d");
  add<One, const Tensor&, Ints, Ints, Ints, Ints, bool>(m, "max_pool2d_values");
  add<One, const Tensor&, const Tensor&, Ints, Ints, Ints, Ints, Ints>(m, "max_pool2d_scatter");
  add<One, const Tensor&, const Tensor&, Ints, Ints, Ints, Ints>(m, "max_pool2d_gather");
}

// `Options...`: alpha, gamma, reduction.
template <class... Options>
void add_sigmoid_focal_loss(pybind11::module_& m) {
  using T = const Tensor&;
  add<One, T, T, Optional, Options...>(m, "sigmoid_focal_loss");
  add<Two, T, T, Optional, Options...>(m, "sigmoid_focal_loss_and_grad");
  add<void, T, T, T, T, Optional, Options...>(m, "sigmoid_focal_loss_scale_grad");
  add<Two, T, T, T, Optional, Options..., std::array<bool, 2>>(m, "sigmoid_focal_loss_vjp");
  add<One, Optional, Optional, T, T, Optional, Options...>(m, "sigmoid_focal_loss_jvp");
  add<Two, T, Optional, Optional, T, T, Optional, Options..., std::array<bool, 2>>(
      m, "sigmoid_focal_loss_hvp");
}

// `Options...`: gamma, ignore_index, reduction, label_smoothing.
template <class... Options>
void add_focal_loss(pybind11::module_& m) {
  using T = const Tensor&;
  add<Two, T, T, Optional, Options...>(m, "focal_loss");
  add<Three, T, T, Optional, Options...>(m, "focal_loss_and_grad");
  add<void, T, T, T, T, T, Optional, Options...>(m, "focal_loss_scale_grad");
  add<Two, T, T, T, T, Optional, Options..., std::array<bool, 2>>(m, "focal_loss_vjp");
  add<One, T, Optional, Optional, T, T, Optional, Options...>(m, "focal_loss_jvp");
  add<Two, T, T, Optional, Optional, T, T, Optional, Options..., std::array<bool, 2>>(
      m, "focal_loss_hvp");
}

}  // namespace

void add_kernels(pybind11::module_& m) {
  pybind11::module_ kernels = m.def_submodule("kernels");
  add_conv2d(kernels);
  add_max_pool2d(kernels);
  add_sigmoid_focal_loss<double, double, int64_t>(kernels);
  add_focal_loss<double, SymInt, int64_t, double>(kernels);
}

}  // namespace dlops
