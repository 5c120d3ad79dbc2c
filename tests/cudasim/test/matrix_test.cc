#include <cmath>
#include <random>

#include "tests/cudasim/exec/number.h"
#include "tests/cudasim/test/ptx_device.h"

namespace cudasim::test {
namespace {

// Where element i of a lane's fragment lies, copied from the tables of the PTX manual ("Matrix
// Fragments for mma.m16n8kK"), one formula per table; not from the simulator.
struct At {
  int row, column;
};
struct Shape {
  const char* ptx;   // types included
  int k;             // depth
  int per_register;  // elements of A and B in 32 bits
  int a_elements, b_elements;
  At (*a)(int lane, int i);
  At (*b)(int lane, int i);
};

At a_m16n8k16_half(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
  return {row, i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8};
}
At b_m16n8k16_half(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8, group};
}
At a_m16n8k8_half(int lane, int i) {
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
}
At b_m16n8k8_half(int lane, int i) { return {lane % 4 * 2 + i, lane >> 2}; }
At a_m16n8k8_tf32(int lane, int i) {
  return {i == 0 || i == 2 ? lane >> 2 : (lane >> 2) + 8, i < 2 ? lane % 4 : lane % 4 + 4};
}
At b_m16n8k8_tf32(int lane, int i) { return {i == 0 ? lane % 4 : lane % 4 + 4, lane >> 2}; }
At a_m16n8k4_tf32(int lane, int i) { return {i == 0 ? lane >> 2 : (lane >> 2) + 8, lane % 4}; }
At b_m16n8k4_tf32(int lane, int) { return {lane % 4, lane >> 2}; }
At a_m16n8k32_byte(int lane, int i) {
  const int row = (i < 4 || (i >= 8 && i < 12)) ? lane >> 2 : (lane >> 2) + 8;
  return {row, i < 8 ? lane % 4 * 4 + (i & 3) : lane % 4 * 4 + (i & 3) + 16};
}
At b_m16n8k32_byte(int lane, int i) {
  return {i < 4 ? lane % 4 * 4 + (i & 3) : lane % 4 * 4 + (i & 3) + 16, lane >> 2};
}
At a_m16n8k16_byte(int lane, int i) {
  return {i < 4 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 4 + (i & 3)};
}
At b_m16n8k16_byte(int lane, int i) { return {lane % 4 * 4 + i, lane >> 2}; }
// C and D, 32-bit and 16-bit elements alike.
At c_m16n8(int lane, int i) {
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
}

const Shape kShapes[] = {
    {"m16n8k16.row.col.f32.bf16.bf16.f32", 16, 2, 8, 4, a_m16n8k16_half, b_m16n8k16_half},
    {"m16n8k16.row.col.f32.f16.f16.f32", 16, 2, 8, 4, a_m16n8k16_half, b_m16n8k16_half},
    {"m16n8k16.row.col.f16.f16.f16.f16", 16, 2, 8, 4, a_m16n8k16_half, b_m16n8k16_half},
    {"m16n8k8.row.col.f32.bf16.bf16.f32", 8, 2, 4, 2, a_m16n8k8_half, b_m16n8k8_half},
    {"m16n8k8.row.col.f32.f16.f16.f32", 8, 2, 4, 2, a_m16n8k8_half, b_m16n8k8_half},
    {"m16n8k8.row.col.f32.tf32.tf32.f32", 8, 1, 4, 2, a_m16n8k8_tf32, b_m16n8k8_tf32},
    {"m16n8k4.row.col.f32.tf32.tf32.f32", 4, 1, 2, 1, a_m16n8k4_tf32, b_m16n8k4_tf32},
    {"m16n8k32.row.col.s32.s8.s8.s32", 32, 4, 16, 8, a_m16n8k32_byte, b_m16n8k32_byte},
    {"m16n8k16.row.col.s32.u8.s8.s32", 16, 4, 8, 4, a_m16n8k16_byte, b_m16n8k16_byte},
};

std::string registers(const char* prefix, int first, int n) {
  std::string s = "{";
  for (int k = 0; k < n; ++k) s += fmt::format("{}{}{}", k ? "," : "", prefix, first + k);
  return s + "}";
}

// A kernel in which every lane loads its a, b and c registers, multiplies and stores d.
std::string mma_kernel(const Shape& s, int na, int nb, int nc) {
  std::string body = R"(.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 in, .param .u64 out)
{
  .reg .b32 %r<40>;
  .reg .b64 %p<5>;
  ld.param.u64 %p0, [in];
  ld.param.u64 %p1, [out];
  mov.u32 %r39, %tid.x;
  mul.wide.u32 %p2, %r39, 128;
  add.s64 %p0, %p0, %p2;
  add.s64 %p1, %p1, %p2;
)";
  const int n = na + nb + nc;
  for (int k = 0; k < n; ++k) body += fmt::format("  ld.global.b32 %r{}, [%p0+{}];\n", k, 4 * k);
  body +=
      fmt::format("  mma.sync.aligned.{} {}, {}, {}, {};\n", s.ptx, registers("%r", 30, nc),
                  registers("%r", 0, na), registers("%r", na, nb), registers("%r", na + nb, nc));
  for (int k = 0; k < nc; ++k)
    body += fmt::format("  st.global.b32 [%p1+{}], %r{};\n", 4 * k, 30 + k);
  return body + "  ret;\n}\n";
}

class Mma : public testing::TestWithParam<Shape> {};

TEST_P(Mma, EqualsTheProductByTheLayoutTables) {
  const Shape& s = GetParam();
  const std::string types = std::string(s.ptx).substr(std::string(s.ptx).find("col.") + 4);
  const bool integer = types.starts_with("s32"), half_result = types.starts_with("f16");
  const bool bf16 = types.find("bf16") != std::string::npos;
  const bool tf32 = types.find("tf32") != std::string::npos;
  const bool a_unsigned = types.find(".u8.") != std::string::npos;
  std::mt19937 random(11);
  const auto value = [&](bool is_unsigned) -> double {
    if (integer) return static_cast<int>(random() % 256) - (is_unsigned ? 0 : 128);
    return (static_cast<int>(random() % 33) - 16) / 8.0;  // exact in every type
  };
  const auto encode = [&](double v) -> u32 {
    if (integer) return static_cast<u32>(static_cast<int>(v)) & 0xff;
    if (tf32) return std::bit_cast<u32>(static_cast<float>(v));
    return bf16 ? to_bf16(static_cast<float>(v)).bits : to_half(static_cast<float>(v)).bits;
  };
  double a[16][32], b[32][8], c[16][8];
  for (auto& row : a)
    for (double& v : row) v = value(a_unsigned);
  for (auto& row : b)
    for (double& v : row) v = value(false);
  for (auto& row : c)
    for (double& v : row) v = integer ? value(false) : value(false) * 4;
  const int na = s.a_elements / s.per_register, nb = s.b_elements / s.per_register;
  const int nc = half_result ? 2 : 4, bits = 32 / s.per_register;
  std::vector<u32> in(32 * 32);
  for (int lane = 0; lane < 32; ++lane) {
    u32* r = in.data() + lane * 32;
    for (int i = 0; i < s.a_elements; ++i) {
      const At at = s.a(lane, i);
      r[i / s.per_register] |= encode(a[at.row][at.column]) << (i % s.per_register * bits) % 32;
    }
    for (int i = 0; i < s.b_elements; ++i) {
      const At at = s.b(lane, i);
      r[na + i / s.per_register] |= encode(b[at.row][at.column])
                                    << (i % s.per_register * bits) % 32;
    }
    for (int i = 0; i < 4; ++i) {
      const At at = c_m16n8(lane, i);
      const double v = c[at.row][at.column];
      if (half_result)
        r[na + nb + i / 2] |= u32{to_half(static_cast<float>(v)).bits} << i % 2 * 16;
      else if (integer)
        r[na + nb + i] = static_cast<u32>(static_cast<int>(v));
      else
        r[na + nb + i] = std::bit_cast<u32>(static_cast<float>(v));
    }
  }
  PtxDevice device;
  const u64 from = device.upload(in), to = device.upload(std::vector<u32>(32 * 32));
  const std::string ptx = mma_kernel(s, na, nb, nc);
  EXPECT_TRUE(assembles(ptx));
  ASSERT_EQ(device.run(ptx, {from, to}), "");
  const auto out = device.download<u32>(to, 32 * 32);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const At at = c_m16n8(lane, i);
      double expected = c[at.row][at.column];
      for (int k = 0; k < s.k; ++k) expected += a[at.row][k] * b[k][at.column];
      double got = 0;
      if (half_result) {
        got = to_float(Half{static_cast<u16>(out[lane * 32 + i / 2] >> i % 2 * 16)});
        expected = to_float(to_half(static_cast<float>(expected)));
      } else if (integer) {
        got = static_cast<i32>(out[lane * 32 + i]);
      } else {
        got = std::bit_cast<float>(out[lane * 32 + i]);
      }
      EXPECT_EQ(got, expected) << "lane " << lane << ", element " << i;
    }
  }
  EXPECT_EQ(device.tally.mma_flops, 2u * 16 * 8 * static_cast<u64>(s.k));
}

INSTANTIATE_TEST_SUITE_P(Shapes, Mma, testing::ValuesIn(kShapes), [](const auto& info) {
  std::string name = info.param.ptx;
  for (char& ch : name) ch = ch == '.' ? '_' : ch;
  return name;
});

// 32 rows of 8 halves in shared memory, element (row, column) = 8 row + column; every lane gives
// the address of row `lane`.
std::string ldmatrix_kernel(const std::string& form, int count) {
  std::string s = R"(.version 7.8
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out)
{
  .shared .align 16 .b8 tile[512];
  .reg .b32 %r<12>;
  .reg .b16 %h;
  .reg .pred %q;
  .reg .b64 %p<4>;
  ld.param.u64 %p0, [out];
  mov.u32 %r0, %tid.x;
  mov.u32 %r1, tile;
  shl.b32 %r2, %r0, 4;
  add.u32 %r3, %r1, %r2;
  shl.b32 %r5, %r0, 3;
  mov.u32 %r6, 0;
FILL:
  add.u32 %r4, %r5, %r6;
  cvt.u16.u32 %h, %r4;
  shl.b32 %r4, %r6, 1;
  add.u32 %r4, %r3, %r4;
  st.shared.u16 [%r4], %h;
  add.u32 %r6, %r6, 1;
  setp.lt.u32 %q, %r6, 8;
  @%q bra FILL;
  bar.sync 0;
)";
  s += fmt::format("  ldmatrix.sync.aligned.m8n8.{}.shared.b16 {}, [%r3];\n", form,
                   registers("%r", 8, count));
  s += "  mul.wide.u32 %p1, %r0, 16;\n  add.s64 %p0, %p0, %p1;\n";
  for (int k = 0; k < count; ++k)
    s += fmt::format("  st.global.b32 [%p0+{}], %r{};\n", 4 * k, 8 + k);
  return s + "  ret;\n}\n";
}

TEST(Ldmatrix, EqualsTheManualsTable) {
  for (const int count : {1, 2, 4}) {
    for (const bool transposed : {false, true}) {
      PtxDevice device;
      const u64 to = device.upload(std::vector<u32>(128));
      const std::string form = fmt::format("x{}{}", count, transposed ? ".trans" : "");
      const std::string ptx = ldmatrix_kernel(form, count);
      EXPECT_TRUE(assembles(ptx));
      ASSERT_EQ(device.run(ptx, {to}), "");
      const auto out = device.download<u32>(to, 128);
      for (u32 lane = 0; lane < 32; ++lane) {
        for (u32 m = 0; m < static_cast<u32>(count); ++m) {
          // Thread t holds elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4 of matrix m, whose row
          // addresses come from lanes 8 m to 8 m + 7.
          for (u32 e = 0; e < 2; ++e) {
            u32 row = lane / 4, column = 2 * (lane % 4) + e;
            if (transposed) std::swap(row, column);
            EXPECT_EQ(out[4 * lane + m] >> 16 * e & 0xffff, 8 * (8 * m + row) + column) << form;
          }
        }
      }
      // 8 rows of 16 bytes, one after the other: each matrix is one pass over the banks.
      EXPECT_EQ(device.tally.shared_wavefronts - 8 * 4, static_cast<u64>(count)) << form;
    }
  }
}

TEST(Movmatrix, Transposes) {
  std::vector<Lane> lanes(32);
  for (u32 l = 0; l < 32; ++l)
    lanes[l].a = (l / 4 * 8 + l % 4 * 2) | (l / 4 * 8 + l % 4 * 2 + 1) << 16;
  const std::string body = "movmatrix.sync.aligned.m8n8.trans.b16 %r0, %ra;";
  const auto got = run_lanes(body, lanes);
  for (u32 l = 0; l < 32; ++l) {
    EXPECT_EQ(got[l].r & 0xffff, l % 4 * 2 * 8 + l / 4);
    EXPECT_EQ(got[l].r >> 16, (l % 4 * 2 + 1) * 8 + l / 4);
  }
}

}  // namespace
}  // namespace cudasim::test
