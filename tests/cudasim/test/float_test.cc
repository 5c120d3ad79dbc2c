#include <bit>
#include <cfenv>
#include <cmath>
#include <random>

#include "tests/cudasim/exec/number.h"
#include "tests/cudasim/test/ptx_device.h"

namespace cudasim::test {
namespace {

u64 bits(float f) { return std::bit_cast<u32>(f); }
u64 bits(double d) { return std::bit_cast<u64>(d); }
float single(u32 b) { return std::bit_cast<float>(b); }

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kQuiet = std::numeric_limits<float>::quiet_NaN();

struct Case {
  const char* body;
  u64 a, b, c;
  u64 expected;
};

const Case kCases[] = {
    {"min.f32 %r0, %ra, %rb;", bits(kQuiet), bits(2.f), 0, bits(2.f)},
    {"max.f32 %r0, %ra, %rb;", bits(3.f), bits(kQuiet), 0, bits(3.f)},
    {"max.f32 %r0, %ra, %rb;", bits(kQuiet), bits(kQuiet), 0, 0x7fffffff},
    {"max.NaN.f32 %r0, %ra, %rb;", bits(kQuiet), bits(3.f), 0, 0x7fffffff},
    {"min.f32 %r0, %ra, %rb;", bits(0.f), bits(-0.f), 0, bits(-0.f)},
    {"max.f32 %r0, %ra, %rb;", bits(-0.f), bits(0.f), 0, bits(0.f)},
    {"add.ftz.f32 %r0, %ra, %rb;", 1, 1, 0, 0},
    {"add.f32 %r0, %ra, %rb;", 1, 1, 0, 2},
    {"mul.ftz.f32 %r0, %ra, %rb;", bits(0x1p-100f), bits(-0x1p-40f), 0, 0x80000000},
    {"add.sat.f32 %r0, %ra, %rb;", bits(0.75f), bits(0.75f), 0, bits(1.f)},
    {"fma.rn.sat.f32 %r0, %ra, %rb, %rc;", bits(-3.f), bits(2.f), bits(1.f), 0},
    {"mul.sat.f32 %r0, %ra, %rb;", bits(kQuiet), bits(2.f), 0, 0},
    {"add.f32 %r0, %ra, %rb;", bits(kInf), bits(-kInf), 0, 0x7fffffff},
    {"add.rz.f32 %r0, %ra, %rb;", bits(1.f), bits(0x1.8p-24f), 0, bits(1.f)},
    {"add.rn.f32 %r0, %ra, %rb;", bits(1.f), bits(0x1.8p-24f), 0, bits(1.f + 0x1p-23f)},
    {"add.rp.f32 %r0, %ra, %rb;", bits(1.f), bits(0x1p-60f), 0, bits(1.f + 0x1p-23f)},
    {"add.rm.f32 %r0, %ra, %rb;", bits(-1.f), bits(-0x1p-60f), 0, bits(-1.f - 0x1p-23f)},
    {"fma.rz.f32 %r0, %ra, %rb, %rc;", bits(1.f), bits(1.f), bits(-0x1p-60f), 0x3f7fffff},
    {"mul.rp.f32 %r0, %ra, %rb;", bits(1.f + 0x1p-23f), bits(1.f + 0x1p-23f), 0,
     bits(1.f + 0x1.8p-22f)},
    {"copysign.f32 %r0, %ra, %rb;", bits(-1.f), bits(3.f), 0, bits(-3.f)},
    {"neg.f32 %r0, %ra;", bits(0.f), 0, 0, bits(-0.f)},
    {"abs.f64 %l0, %la;", bits(-2.0), 0, 0, bits(2.0)},
    {"div.rn.f32 %r0, %ra, %rb;", bits(1.f), bits(3.f), 0, bits(1.f / 3.f)},
    {"sqrt.rn.f32 %r0, %ra;", bits(2.f), 0, 0, bits(std::sqrt(2.f))},
    {"rcp.rn.f64 %l0, %la;", bits(3.0), 0, 0, bits(1.0 / 3.0)},
    {"{ setp.eq.f32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", bits(kQuiet), bits(kQuiet), 0, 2},
    {"{ setp.ne.f32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", bits(kQuiet), bits(1.f), 0, 2},
    {"{ setp.neu.f32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", bits(kQuiet), bits(1.f), 0, 1},
    {"{ setp.ltu.f32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", bits(kQuiet), bits(1.f), 0, 1},
    {"{ setp.lt.f32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", bits(kQuiet), bits(1.f), 0, 2},
    {"{ setp.num.f32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", bits(1.f), bits(1.f), 0, 1},
    {"{ setp.nan.f32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", bits(kQuiet), bits(1.f), 0, 1},
    {"{ setp.gt.ftz.f32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", 5, 0, 0, 2},
    {"set.gt.f32.f32 %r0, %ra, %rb;", bits(2.f), bits(1.f), 0, bits(1.f)},
    {"cvt.rni.s32.f32 %r0, %ra;", bits(2.5f), 0, 0, 2},
    {"cvt.rni.s32.f32 %r0, %ra;", bits(3.5f), 0, 0, 4},
    {"cvt.rzi.s32.f32 %r0, %ra;", bits(-2.9f), 0, 0, static_cast<u32>(-2)},
    {"cvt.rmi.s32.f32 %r0, %ra;", bits(-2.1f), 0, 0, static_cast<u32>(-3)},
    {"cvt.rpi.s32.f32 %r0, %ra;", bits(2.1f), 0, 0, 3},
    {"cvt.rzi.s32.f32 %r0, %ra;", bits(3e9f), 0, 0, 0x7fffffff},
    {"cvt.rzi.u32.f32 %r0, %ra;", bits(-5.f), 0, 0, 0},
    {"cvt.rzi.s32.f32 %r0, %ra;", bits(kQuiet), 0, 0, 0},
    {"cvt.rmi.f32.f32 %r0, %ra;", bits(-2.1f), 0, 0, bits(-3.f)},
    {"cvt.rzi.f64.f64 %l0, %la;", bits(-2.9), 0, 0, bits(-2.0)},
    {"cvt.rn.f32.s32 %r0, %ra;", 0x01000001, 0, 0, bits(0x1p24f)},
    {"cvt.rz.f32.u32 %r0, %ra;", 0xffffffff, 0, 0, bits(0x1.fffffep31f)},
    {"cvt.rp.f32.s32 %r0, %ra;", 0x01000001, 0, 0, bits(0x1p24f + 2)},
    {"cvt.rn.f32.f64 %r0, %la;", bits(1.0 + 0x1p-24), 0, 0, bits(1.f)},
    {"cvt.rp.f32.f64 %r0, %la;", bits(1.0 + 0x1p-40), 0, 0, bits(1.f + 0x1p-23f)},
    {"cvt.f64.f32 %l0, %ra;", bits(0x1p-149f), 0, 0, bits(0x1p-149)},
    {"cvt.sat.f32.f32 %r0, %ra;", bits(-1.f), 0, 0, 0},
    {"cvt.rn.bf16.f32 %h0, %ra;", 0x3f808000, 0, 0, 0x3f80},
    {"cvt.rn.bf16.f32 %h0, %ra;", 0x3f818000, 0, 0, 0x3f82},
    {"cvt.rz.bf16.f32 %h0, %ra;", 0x3f81ffff, 0, 0, 0x3f81},
    {"cvt.rn.bf16.f32 %h0, %ra;", bits(kQuiet), 0, 0, 0x7fff},
    {"cvt.rn.f16.f32 %h0, %ra;", bits(65520.f), 0, 0, 0x7c00},
    {"cvt.rz.f16.f32 %h0, %ra;", bits(65519.f), 0, 0, 0x7bff},
    {"cvt.rn.f16.f32 %h0, %ra;", bits(0x1p-25f), 0, 0, 0},
    {"cvt.rn.f16.f32 %h0, %ra;", bits(0x1.8p-25f), 0, 0, 1},
    {"cvt.f32.f16 %r0, %ha;", 0x0001, 0, 0, bits(0x1p-24f)},
    // From registers wider than the type: the low bits.
    {"cvt.f32.f16 %r0, %ra;", 0x7c000001, 0, 0, bits(0x1p-24f)},
    {"cvt.f32.f16 %r0, %la;", 0x12345678'7c003c00ull, 0, 0, bits(1.f)},
    {"cvt.rn.f32.s32 %r0, %la;", 0x12345678'ffffffffull, 0, 0, bits(-1.f)},
    {"cvt.rni.s32.f32 %r0, %la;", 0x3f800000'40200000ull, 0, 0, 2},
    {"cvt.f64.f32 %l0, %la;", 0x40000000'3f800000ull, 0, 0, bits(1.0)},
    {"cvt.f32.f16 %r0, %ha;", 0xfc00, 0, 0, bits(-kInf)},
    {"cvt.rn.bf16x2.f32 %r0, %ra, %rb;", bits(1.f), bits(2.f), 0, 0x3f804000},
    {"cvt.rn.f16x2.f32 %r0, %ra, %rb;", bits(1.f), bits(2.f), 0, 0x3c004000},
    {"cvt.rn.relu.bf16x2.f32 %r0, %ra, %rb;", bits(-1.f), bits(2.f), 0, 0x00004000},
    {"cvt.rna.tf32.f32 %r0, %ra;", 0x3f801000, 0, 0, 0x3f802000},
    {"fma.rn.bf16x2 %r0, %ra, %rb, %rc;", 0x3f804000, 0x40004040, 0x3f803f80, 0x404040e0},
    {"fma.rn.relu.bf16x2 %r0, %ra, %rb, %rc;", 0xbf804000, 0x40004040, 0x3f803f80, 0x000040e0},
    {"mul.f16x2 %r0, %ra, %rb;", 0x3c004000, 0x40004200, 0, 0x40004600},
    {"add.f16 %h0, %ha, %hb;", 0x3c00, 0x3c00, 0, 0x4000},
    {"max.bf16x2 %r0, %ra, %rb;", 0x3f80bf80, 0x40003f80, 0, 0x40003f80},
    {"min.NaN.f16 %h0, %ha, %hb;", 0x7e00, 0x3c00, 0, 0x7fff},
    {"neg.bf16x2 %r0, %ra;", 0x3f80bf80, 0, 0, 0xbf803f80},
    {"abs.f16 %h0, %ha;", 0xbc00, 0, 0, 0x3c00},
    {"{ setp.gt.f16x2 %p|%q, %ra, %rb; selp.b32 %r0, 1, 2, %q; }", 0x40003c00, 0x3c003c00, 0, 1},
    {"ex2.approx.ftz.f32 %r0, %ra;", bits(-2.f), 0, 0, bits(0.25f)},
    {"ex2.approx.ftz.f32 %r0, %ra;", bits(-kInf), 0, 0, 0},
    {"lg2.approx.f32 %r0, %ra;", bits(8.f), 0, 0, bits(3.f)},
    {"lg2.approx.f32 %r0, %ra;", bits(0.f), 0, 0, bits(-kInf)},
    {"rsqrt.approx.f32 %r0, %ra;", bits(4.f), 0, 0, bits(0.5f)},
    {"rsqrt.approx.f32 %r0, %ra;", bits(-1.f), 0, 0, 0x7fffffff},
    {"rcp.approx.ftz.f32 %r0, %ra;", bits(-0.f), 0, 0, bits(-kInf)},
    {"rcp.approx.ftz.f32 %r0, %ra;", 1, 0, 0, bits(kInf)},
    {"div.approx.f32 %r0, %ra, %rb;", bits(1.f), bits(0x1.8p126f), 0, 0},
    {"tanh.approx.f32 %r0, %ra;", bits(kInf), 0, 0, bits(1.f)},
    {"sin.approx.f32 %r0, %ra;", bits(-0.f), 0, 0, bits(-0.f)},
};

TEST(Float, FollowsTheManual) {
  for (const Case& c : kCases) {
    const std::string body = c.body;
    const Result r = run_lanes(body, {{c.a, c.b, c.c}})[0];
    const u64 got = body.find("%l0") != std::string::npos   ? r.l
                    : body.find("%r0") != std::string::npos ? r.r
                                                            : r.h;
    EXPECT_EQ(got, c.expected) << body;
  }
}

TEST(Float, EveryInstructionExists) {
  std::string all;
  for (const Case& c : kCases) all += std::string(c.body) + "\n";
  EXPECT_TRUE(assembles(lane_kernel(all)));
}

std::vector<Lane> random_floats(u32 seed) {
  std::mt19937 random(seed);
  std::vector<Lane> lanes(32);
  for (auto& l : lanes) {
    // Exponents close to each other, so that rounding matters.
    const auto f = [&] { return (random() & 0x807fffff) | (120 + random() % 16) << 23; };
    l = {f(), f(), f()};
  }
  return lanes;
}

// The processor's own rounding modes are the oracle.
TEST(Float, RoundingModesEqualTheProcessors) {
  const std::pair<const char*, int> modes[] = {
      {"rn", FE_TONEAREST}, {"rz", FE_TOWARDZERO}, {"rm", FE_DOWNWARD}, {"rp", FE_UPWARD}};
  for (const auto& [name, mode] : modes) {
    for (u32 seed = 0; seed < 30; ++seed) {
      const auto lanes = random_floats(seed);
      const auto sum = run_lanes(fmt::format("add.{}.f32 %r0, %ra, %rb;", name), lanes);
      const auto product = run_lanes(fmt::format("mul.{}.f32 %r0, %ra, %rb;", name), lanes);
      const auto fused = run_lanes(fmt::format("fma.{}.f32 %r0, %ra, %rb, %rc;", name), lanes);
      for (std::size_t k = 0; k < 32; ++k) {
        const volatile float a = single(static_cast<u32>(lanes[k].a));
        const volatile float b = single(static_cast<u32>(lanes[k].b));
        const volatile float c = single(static_cast<u32>(lanes[k].c));
        std::fesetround(mode);
        const volatile float s = a + b, p = a * b, f = std::fma(a, b, c);
        std::fesetround(FE_TONEAREST);
        EXPECT_EQ(sum[k].r, bits(static_cast<float>(s))) << name;
        EXPECT_EQ(product[k].r, bits(static_cast<float>(p))) << name;
        EXPECT_EQ(fused[k].r, bits(static_cast<float>(f))) << name;
      }
    }
  }
}

// Every half, there and back; and the value by the format's definition.
TEST(Float, EveryHalfConvertsExactly) {
  for (u32 first = 0; first < 0x10000; first += 32) {
    std::vector<Lane> lanes(32);
    for (u32 k = 0; k < 32; ++k) lanes[k].a = first + k;
    const auto f16 = run_lanes("cvt.f32.f16 %r0, %ha; cvt.rn.f16.f32 %h0, %r0;", lanes);
    for (u32 k = 0; k < 32; ++k) {
      const u32 h = first + k, exponent = h >> 10 & 31, mantissa = h & 1023;
      if (exponent == 31) continue;
      const double magnitude = exponent == 0
                                   ? std::ldexp(mantissa, -24)
                                   : std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25);
      const double value = (h & 0x8000) != 0 ? -magnitude : magnitude;
      ASSERT_EQ(single(f16[k].r), static_cast<float>(value)) << h;
      ASSERT_EQ(f16[k].h, h);
    }
  }
}

// A fused multiply-add of halves is rounded once: in long double it is exact, and the nearest half
// is found by trying the neighbours.
TEST(Float, HalfFmaRoundsOnce) {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    std::vector<Lane> lanes(32);
    for (auto& l : lanes) {
      const auto h = [&] { return (random() & 0x83ff) | (8 + random() % 14) << 10; };
      l = {h(), h(), h()};
    }
    const auto got = run_lanes("fma.rn.f16 %h0, %ha, %hb, %hc;", lanes);
    for (std::size_t k = 0; k < 32; ++k) {
      const auto value = [](u64 h) {
        return static_cast<long double>(to_float(Half{static_cast<u16>(h)}));
      };
      const long double exact = value(lanes[k].a) * value(lanes[k].b) + value(lanes[k].c);
      const u16 h = got[k].h;
      if ((h & 0x7c00) == 0x7c00) continue;
      const long double error = std::fabs(value(h) - exact);
      for (const int step : {-1, 1}) {
        const u16 other = static_cast<u16>(h + step);
        if ((other & 0x7c00) == 0x7c00 || (other & 0x8000) != (h & 0x8000)) continue;
        const long double other_error = std::fabs(value(other) - exact);
        EXPECT_TRUE(error < other_error || (error == other_error && (h & 1) == 0));
      }
    }
  }
}

TEST(Float, ApproximationsKeepTheManualsBounds) {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> small(-3.14f, 3.14f), positive(1e-3f, 1e3f), wide(-80, 80);
  std::vector<Lane> s(32), p(32), x(32);
  for (int k = 0; k < 32; ++k)
    s[k].a = bits(small(random)), p[k].a = bits(positive(random)), x[k].a = bits(wide(random));
  const auto check = [](const char* body, const std::vector<Lane>& in, auto f, double relative,
                        double absolute) {
    const auto got = run_lanes(body, in);
    for (std::size_t k = 0; k < in.size(); ++k) {
      const double expected = f(static_cast<double>(single(static_cast<u32>(in[k].a))));
      EXPECT_NEAR(single(got[k].r), expected, relative * std::fabs(expected) + absolute) << body;
    }
  };
  check(
      "sin.approx.f32 %r0, %ra;", s, [](double v) { return std::sin(v); }, 0, 0x1p-20);
  check(
      "cos.approx.f32 %r0, %ra;", s, [](double v) { return std::cos(v); }, 0, 0x1p-20);
  check(
      "ex2.approx.f32 %r0, %ra;", x, [](double v) { return std::exp2(v); }, 0x1p-22, 0);
  check(
      "lg2.approx.f32 %r0, %ra;", p, [](double v) { return std::log2(v); }, 0x1p-22, 0x1p-22);
  check(
      "rsqrt.approx.f32 %r0, %ra;", p, [](double v) { return 1 / std::sqrt(v); }, 0x1p-22, 0);
  check(
      "rcp.approx.f32 %r0, %ra;", p, [](double v) { return 1 / v; }, 0x1p-23, 0);
  check(
      "sqrt.approx.f32 %r0, %ra;", p, [](double v) { return std::sqrt(v); }, 0x1p-22, 0);
  check(
      "tanh.approx.f32 %r0, %ra;", s, [](double v) { return std::tanh(v); }, 0x1p-10, 0);
}

}  // namespace
}  // namespace cudasim::test
