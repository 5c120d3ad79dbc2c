#include <bit>
#include <random>

#include "tests/cudasim/test/ptx_device.h"

namespace cudasim::test {
namespace {

std::vector<Lane> numbered() {
  std::vector<Lane> lanes(32);
  for (u32 k = 0; k < 32; ++k) lanes[k] = {100 + k, k % 7, k};
  return lanes;
}

// The pseudo-code of shfl.sync in the manual.
TEST(Shuffle, EqualsTheManualsPseudoCode) {
  for (const char* mode : {"up", "down", "bfly", "idx"}) {
    for (const u32 width : {32u, 16u, 8u, 4u}) {
      const u32 clamp = std::string(mode) == "up" ? 0 : 31;
      const u32 c = (32 - width) << 8 | clamp;
      const auto in = numbered();
      const auto got = run_lanes(
          fmt::format("shfl.sync.{}.b32 %r0|%p, %ra, %rb, {}, 0xffffffff; selp.b64 %l0, 1, 0, %p;",
                      mode, c),
          in);
      for (u32 lane = 0; lane < 32; ++lane) {
        const u32 b = static_cast<u32>(in[lane].b), segmask = c >> 8, cval = c & 31;
        const int max_lane = static_cast<int>((lane & segmask) | (cval & ~segmask));
        const u32 min_lane = lane & segmask;
        int j = 0;
        bool p = false;
        if (std::string(mode) == "up") j = static_cast<int>(lane - b), p = j >= max_lane;
        if (std::string(mode) == "down") j = static_cast<int>(lane + b), p = j <= max_lane;
        if (std::string(mode) == "bfly") j = static_cast<int>(lane ^ b), p = j <= max_lane;
        if (std::string(mode) == "idx")
          j = static_cast<int>(min_lane | (b & ~segmask)), p = j <= max_lane;
        if (!p) j = static_cast<int>(lane);
        EXPECT_EQ(got[lane].r, 100u + static_cast<u32>(j)) << mode << ' ' << width << ' ' << lane;
        EXPECT_EQ(got[lane].l, p ? 1u : 0u);
      }
    }
  }
}

TEST(Vote, AllAnyUniBallot) {
  const auto in = numbered();
  const auto got = run_lanes(
      "setp.gt.u32 %p, %rc, 19; vote.sync.ballot.b32 %r0, %p, 0xffffffff;"
      "vote.sync.any.pred %q, %p, 0xffffffff; selp.b64 %l0, 1, 0, %q;"
      "vote.sync.all.pred %q, !%p, 0xffffffff; selp.b16 %h0, 1, 0, %q;",
      in);
  for (const auto& r : got) {
    EXPECT_EQ(r.r, 0xfff00000u);
    EXPECT_EQ(r.l, 1u);
    EXPECT_EQ(r.h, 0u);
  }
}

TEST(Vote, OnlyMembersCount) {
  // The upper half votes with its own mask.
  const auto got = run_lanes(
      "setp.gt.u32 %p, %rc, 15; selp.b32 %r1, 0xffff0000, 0x0000ffff, %p; setp.gt.u32 %q, %rc, 13;"
      "vote.sync.ballot.b32 %r0, %q, %r1;",
      numbered());
  for (u32 k = 0; k < 32; ++k) EXPECT_EQ(got[k].r, k < 16 ? 0xc000u : 0xffff0000u);
}

TEST(Match, AnyAndAll) {
  const auto in = numbered();
  const auto got = run_lanes(
      "match.any.sync.b32 %r0, %rb, 0xffffffff; match.all.sync.b32 %r1|%p, %rb, 0xffffffff;"
      "cvt.u64.u32 %l0, %r1;",
      in);
  for (u32 k = 0; k < 32; ++k) {
    u32 expected = 0;
    for (u32 j = 0; j < 32; ++j) expected |= in[j].b == in[k].b ? 1u << j : 0;
    EXPECT_EQ(got[k].r, expected);
    EXPECT_EQ(got[k].l, 0u);
  }
}

TEST(Redux, SumMinMaxAndOrXor) {
  const auto in = numbered();
  u32 sum = 0, all_or = 0, all_xor = 0, all_and = ~0u;
  for (const auto& l : in) {
    const u32 a = static_cast<u32>(l.a);
    sum += a, all_or |= a, all_xor ^= a, all_and &= a;
  }
  const std::pair<const char*, u32> cases[] = {{"add.u32", sum},     {"min.s32", 100},
                                               {"max.u32", 131},     {"or.b32", all_or},
                                               {"xor.b32", all_xor}, {"and.b32", all_and}};
  for (const auto& [op, expected] : cases) {
    const auto got = run_lanes(fmt::format("redux.sync.{} %r0, %ra, 0xffffffff;", op), in);
    for (const auto& r : got) EXPECT_EQ(r.r, expected) << op;
  }
}

// %ra: lane. The module's kernel runs `body` for one block; reports come back.
std::string fault_of(const std::string& body, Dim block = {32, 1, 1}) {
  PtxDevice device;
  const u64 in = device.upload(std::vector<Lane>(1024));
  const u64 out = device.upload(std::vector<Lane>(1024));
  return device.run(lane_kernel("mov.u32 %ra, %laneid; mov.u32 %rb, %tid.x;" + body), {in, out}, {},
                    block);
}

TEST(Masks, LaneMissingFromItsOwnMask) {
  const std::string report = fault_of("shfl.sync.idx.b32 %r0, %ra, 0, 31, 0x0000ffff;");
  EXPECT_TRUE(report.starts_with("warp-mask")) << report;
  EXPECT_NE(report.find("thread (16,0,0)"), std::string::npos) << report;
}

TEST(Masks, LanesThatNeverCome) {
  const std::string report = fault_of(
      "setp.lt.u32 %p, %ra, 16; @!%p bra OUT; shfl.sync.idx.b32 %r0, %ra, 0, 31, 0xffffffff; OUT:");
  EXPECT_TRUE(report.starts_with("warp-mask")) << report;
}

TEST(Masks, HalvesOfAWarpWithTheirOwnMasks) {
  EXPECT_EQ(fault_of("setp.lt.u32 %p, %ra, 16; @!%p bra HIGH;"
                     "shfl.sync.idx.b32 %r0, %ra, 3, 31, 0x0000ffff; bra OUT;"
                     "HIGH: shfl.sync.idx.b32 %r0, %ra, 20, 31, 0xffff0000; OUT:"),
            "");
}

TEST(Barriers, DivergedWarp) {
  const std::string report = fault_of("setp.lt.u32 %p, %ra, 16; @!%p bra OUT; bar.sync 0; OUT:");
  EXPECT_TRUE(report.starts_with("barrier-divergence")) << report;
}

TEST(Barriers, WarpsAtDifferentBarriers) {
  const std::string report = fault_of(
      "setp.lt.u32 %p, %rb, 32; @!%p bra HIGH; bar.sync 0; bra OUT; HIGH: bar.sync 0; OUT:",
      {64, 1, 1});
  EXPECT_TRUE(report.starts_with("barrier-divergence")) << report;
}

TEST(Barriers, NamedBarrierThatLacksAWarp) {
  const std::string report =
      fault_of("setp.lt.u32 %p, %rb, 32; @!%p bra OUT; bar.sync 1, 64; OUT:", {64, 1, 1});
  EXPECT_TRUE(report.starts_with("barrier-divergence")) << report;
}

TEST(Barriers, ExitedWarpsCountAsHere) {
  EXPECT_EQ(fault_of("setp.lt.u32 %p, %rb, 32; @!%p ret; bar.sync 0;", {64, 1, 1}), "");
}

TEST(Barriers, Reductions) {
  PtxDevice device;
  const u64 in = device.upload(std::vector<Lane>(96));
  const u64 out = device.upload(std::vector<Lane>(96));
  EXPECT_EQ(device.run(lane_kernel("mov.u32 %rb, %tid.x; setp.gt.u32 %p, %rb, 69;"
                                   "bar.red.popc.u32 %r0, 0, %p; bar.red.or.pred %q, 0, %p;"
                                   "selp.b64 %l0, 1, 0, %q; bar.red.and.pred %q, 0, !%p;"
                                   "selp.b16 %h0, 1, 0, %q;"),
                       {in, out}, {}, {96, 1, 1}),
            "");
  for (const auto& l : device.download<Lane>(out, 96)) {
    EXPECT_EQ(static_cast<u32>(l.b), 26u);
    EXPECT_EQ(l.c, 1u);
    EXPECT_EQ(static_cast<u16>(l.a), 0u);
  }
}

}  // namespace
}  // namespace cudasim::test
