#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "bindings/register.h"

namespace moe_ep {
namespace {

pybind11::dict build_info() {
    pybind11::list archs;
    std::istringstream names(MOE_EP_CUDA_ARCHS);
    for (std::string name; names >> name;) archs.append(name);
    pybind11::dict info;
    info["cuda"] = bool(MOE_EP_WITH_CUDA);
    info["cuda_version"] = MOE_EP_CUDA_VERSION;
    info["cuda_archs"] = archs;
    info["nvshmem_version"] = MOE_EP_NVSHMEM_VERSION;
    info["not_built"] = MOE_EP_BUILD_NOTES;
    return info;
}

}  // namespace

void register_build_info(pybind11::module_& module) {
    module.def("build_info", &build_info, R"(What this build holds.

Returns:
    cuda: whether the CUDA kernels are in it. cuda_version: of the toolkit, "" without. cuda_archs: targets as
    MOE_EP_CUDA_ARCHS spells them. nvshmem_version: what moe_ep._C_internode was built against, "" when it was not built.
    not_built: what was left out and why, "" for nothing.)");
}

}  // namespace moe_ep
