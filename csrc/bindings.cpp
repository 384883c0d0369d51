// The Python module pyattn._C: turns tensors into pointers, sizes and strides, and calls the kernels without the GIL.
//
// pyattn's Python layers have checked every call with messages meant for users; the checks here only make sure that no
// argument, from wherever, lets a kernel touch memory that is not its own. (One translation unit: pybind11's headers
// take 8 seconds to compile.)
#include "attention.h"
#include "binding.h"
#include "cross_entropy.h"
#include "dispatch.h"
#include "embedding_bag.h"
#include "linear_cross_entropy.h"
#include "lstm.h"
#include "signature.h"

namespace pyattn {
namespace {

#include "bind_attention-inl.h"
#include "bind_cross_entropy-inl.h"
#include "bind_embedding_bag-inl.h"
#include "bind_linear_cross_entropy-inl.h"
#include "bind_lstm-inl.h"

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
  m.def("embedding_bag_forward", &pyattn::embedding_bag_forward, py::arg("operands"), py::arg("config"), py::arg("out"),
        py::arg("largest"), py::arg("threads"),
        "Fills out and, unless it is None, largest; see pyattn.reference.embedding_bag_forward for what they are. "
        "Returns -1, or a bag with an id, length or offset that is none, and then has filled nothing of use.");
  py::class_<pyattn::BagTerms>(m, "BagTerms", "The tokens of a problem that count, in the order of their rows.")
      .def(py::init<const py::tuple&, const py::tuple&>(), py::arg("operands"), py::arg("config"))
      .def_readonly("bad_bag", &pyattn::BagTerms::bad_bag, "What embedding_bag_forward returns.")
      .def_property_readonly(
          "rows", [](const pyattn::BagTerms& t) { return t.terms.rows; }, "Different rows among them.");
  m.def("embedding_bag_backward", &pyattn::embedding_bag_backward, py::arg("terms"), py::arg("dout"),
        py::arg("largest"), py::arg("operands"), py::arg("config"), py::arg("dweight"), py::arg("row_ids"),
        py::arg("threads"),
        "Fills dweight with the gradient; if row_ids is given, both with those rows alone that a token names.");
  m.def("embedding_bag_weights_backward", &pyattn::embedding_bag_weights_backward, py::arg("dout"), py::arg("operands"),
        py::arg("config"), py::arg("dw"), py::arg("threads"),
        "Sets the gradient of the per-sample weights for the tokens that count. Returns what the forward does.");
  m.def("linear_cross_entropy_forward", &pyattn::linear_cross_entropy_forward, py::arg("operands"), py::arg("config"),
        py::arg("loss"), py::arg("m"), py::arg("l"), py::arg("gradients"), py::arg("threads"),
        "Fills loss, unless they are None m and l, and those of the gradients (dinput, dlinear_weight, dlinear_bias) "
        "that are not None, for a gradient of 1 of a loss that is reduced. Returns what cross_entropy_forward does.");
  m.def("linear_cross_entropy_backward", &pyattn::linear_cross_entropy_backward, py::arg("dloss"), py::arg("m"),
        py::arg("l"), py::arg("operands"), py::arg("config"), py::arg("gradients"), py::arg("threads"),
        "Fills those of the gradients that are not None; see pyattn.reference.linear_cross_entropy_backward.");
  m.def("lstm_forward", &pyattn::lstm_forward, py::arg("operands"), py::arg("reverse"), py::arg("output"),
        py::arg("h_n"), py::arg("c_n"), py::arg("saved"), py::arg("threads"),
        "Fills output, h_n, c_n and, unless it is None, saved, [batch * seq, 5 * whole units]; see "
        "pyattn.reference.lstm_forward. Returns -1, or the first sample whose length is not in [0, seq], and then has "
        "filled nothing.");
  m.def("lstm_backward", &pyattn::lstm_backward, py::arg("doutput"), py::arg("dh_n"), py::arg("dc_n"), py::arg("saved"),
        py::arg("operands"), py::arg("reverse"), py::arg("gradients"), py::arg("threads"),
        "Fills gradients, which are (dinput, dh0, dc0, dweight_ih, dweight_hh, dbias), the last four of them optional "
        "or None; see pyattn.reference.lstm_backward. Returns what lstm_forward does.");
  m.def(
      "isa", [] { return std::string(pyattn::kernels().isa); },
      "The kernel variant in use: the best available, or the one that PYATTN_ISA names.");
  m.def("compiled_isas", &pyattn::compiled_isas, "The variants of this build, best first.");
  m.def("available_isas", &pyattn::available_isas, "Those of them that this machine can run, best first.");
}
