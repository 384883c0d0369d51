// The Python module pyattn._C: turns tensors into pointers, sizes and strides, and calls the kernels without the GIL.
//
// pyattn's Python layers have checked every call with messages meant for users; the checks here only make sure that no
// argument, from wherever, lets a kernel touch memory that is not its own. (One translation unit: pybind11's headers
// take 8 seconds to compile.)
#include "attention.h"
#include "binding.h"
#include "cross_entropy.h"
#include "dispatch.h"
#include "signature.h"

namespace pyattn {
namespace {

#include "bind_attention-inl.h"
#include "bind_cross_entropy-inl.h"

}  // namespace
}  // namespace pyattn

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyattn's C++ core";
  if (!pyattn::add_signature(m.ptr()) || !pyattn::add_operands(m.ptr())) throw py::error_already_set();

  m.def("attention_forward", &pyattn::attention_forward, py::arg("operands"), py::arg("config"), py::arg("out"),
        py::arg("lse"), py::arg("threads"),
        "Fills out and, unless it is None, lse; see pyattn.reference.attention_forward for what they are.");
  m.def("attention_backward", &pyattn::attention_backward, py::arg("do"), py::arg("dlse"), py::arg("out"),
        py::arg("lse"), py::arg("operands"), py::arg("config"), py::arg("gradients"), py::arg("threads"),
        "Fills gradients, which are (dq, dk, dv, dbias or None); see pyattn.reference.attention_backward.");
  m.def("cross_entropy_forward", &pyattn::cross_entropy_forward, py::arg("operands"), py::arg("config"),
        py::arg("loss"), py::arg("m"), py::arg("l"), py::arg("threads"),
        "Fills loss and, unless they are None, m and l; see pyattn.reference.cross_entropy_forward for what they are. "
        "Returns -1, or the first row whose target is no class, and then has filled nothing.");
  m.def("cross_entropy_backward", &pyattn::cross_entropy_backward, py::arg("dloss"), py::arg("m"), py::arg("l"),
        py::arg("operands"), py::arg("config"), py::arg("dinput"), py::arg("threads"),
        "Fills dinput; see pyattn.reference.cross_entropy_backward. Returns what cross_entropy_forward does.");
  m.def(
      "isa", [] { return std::string(pyattn::kernels().isa); },
      "The kernel variant in use: the best available, or the one that PYATTN_ISA names.");
  m.def("compiled_isas", &pyattn::compiled_isas, "The variants of this build, best first.");
  m.def("available_isas", &pyattn::available_isas, "Those of them that this machine can run, best first.");
}
