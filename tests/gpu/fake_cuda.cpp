// A CUDA device without memory that computes nothing, for a PyTorch built for CPUs (2.13, Linux on x86-64).
// Loaded in front of PyTorch (LD_PRELOAD). The rest of the device is in device.py.

#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

namespace {

const Device the_device(DeviceType::CUDA, 0);
const Stream the_stream(Stream::DEFAULT, the_device);

// What the backward pass and events ask: which device and stream are current.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return the_device; }
  Device getDevice() const override { return the_device; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return the_stream; }
  Stream exchangeStream(Stream) const override { return the_stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

// These stand in front of PyTorch's own, which know at compile time that there is no accelerator.
namespace accelerator {
std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
bool isAccelerator(DeviceType type) { return type == DeviceType::CUDA; }
DeviceIndex deviceCount() { return 1; }
void setDeviceIndex(DeviceIndex) {}
DeviceIndex getDeviceIndex() { return 0; }
DeviceIndex exchangeDevice(DeviceIndex) { return 0; }
DeviceIndex maybeExchangeDevice(DeviceIndex) { return 0; }
Stream getCurrentStream(DeviceIndex) { return the_stream; }
void setCurrentStream(Stream) {}
}  // namespace accelerator

}  // namespace at
