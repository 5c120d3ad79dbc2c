#include "tests/cudasim/test/ptx_device.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "tests/cudasim/code/decode.h"
#include "tests/cudasim/exec/launch.h"
#include "tests/cudasim/ptx/parser.h"

namespace cudasim::test {

std::string PtxDevice::run(const std::string& text, const std::vector<u64>& parameters, Dim grid,
                           Dim block, u64 dynamic_shared) {
  const ptx::Module module = ptx::parse(text);
  const auto no_symbol = [](const std::string& name) -> u64 { fail("no symbol {}", name); };
  const auto program = decode(module, *module.find("k"), no_symbol);
  Launch launch;
  launch.program = program.get();
  launch.arena = &arena;
  launch.grid = grid;
  launch.block = block;
  launch.parameters.resize(program->parameter_bytes);
  for (std::size_t k = 0; k < parameters.size(); ++k) {
    std::memcpy(launch.parameters.data() + 8 * k, &parameters[k], 8);
  }
  launch.dynamic_shared = dynamic_shared;
  launch.places = 1;
  launch.id = next_id_++;
  launch.first_tag = next_tag_;
  next_tag_ += static_cast<u32>(grid.count());
  launch.seed = seed;
  launch.max_instructions = 1'000'000;
  tally = run_launch(launch, 2);
  return launch.report == nullptr ? "" : launch.report->text;
}

std::string lane_kernel(const std::string& body) {
  return R"(.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 in, .param .u64 out)
{
  .reg .pred %p, %q;
  .reg .b16 %ha, %hb, %hc, %h0, %h1;
  .reg .b32 %ra, %rb, %rc, %r0, %r1, %t;
  .reg .b64 %la, %lb, %lc, %l0, %l1, %in, %out, %o;
  ld.param.u64 %in, [in];
  ld.param.u64 %out, [out];
  mov.u32 %t, %tid.x;
  mul.wide.u32 %o, %t, 24;
  add.s64 %in, %in, %o;
  add.s64 %out, %out, %o;
  ld.global.u64 %la, [%in];
  ld.global.u64 %lb, [%in+8];
  ld.global.u64 %lc, [%in+16];
  cvt.u32.u64 %ra, %la;
  cvt.u32.u64 %rb, %lb;
  cvt.u32.u64 %rc, %lc;
  cvt.u16.u64 %ha, %la;
  cvt.u16.u64 %hb, %lb;
  cvt.u16.u64 %hc, %lc;
  mov.b16 %h0, 0;
  mov.b32 %r0, 0;
  mov.b64 %l0, 0;
)" + body +
         R"(
  st.global.u16 [%out], %h0;
  st.global.u32 [%out+8], %r0;
  st.global.u64 [%out+16], %l0;
  ret;
}
)";
}

std::vector<Result> run_lanes(const std::string& body, std::vector<Lane> lanes) {
  PtxDevice device;
  const std::size_t n = lanes.size();
  lanes.resize(32);
  const u64 in = device.upload(lanes);
  const u64 out = device.upload(std::vector<u64>(96));
  const std::string ptx = lane_kernel(body);
  EXPECT_EQ(device.run(ptx, {in, out}), "") << body;
  const auto words = device.download<u64>(out, 96);
  std::vector<Result> results;
  for (std::size_t k = 0; k < n; ++k) {
    results.push_back(
        {static_cast<u16>(words[3 * k]), static_cast<u32>(words[3 * k + 1]), words[3 * k + 2]});
  }
  return results;
}

bool assembles(const std::string& ptx, const std::string& arch) {
  const std::string file = fmt::format("/tmp/cudasim_{}.ptx", getpid());
  std::ofstream(file) << ptx;
  const std::string command = fmt::format("{} -arch={} -o /dev/null {}", CUDASIM_PTXAS, arch, file);
  const int status = std::system(command.c_str());
  std::remove(file.c_str());
  return status == 0;
}

}  // namespace cudasim::test
