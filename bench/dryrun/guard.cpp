// A device guard for CUDA that does nothing. A build of PyTorch without CUDA lacks one, and needs it for fake tensors.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
};

const bool registered = [] {
  static const OneDevice guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
  return true;
}();

} // namespace
