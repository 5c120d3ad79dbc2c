#include <bit>
#include <random>

#include "tests/cudasim/test/ptx_device.h"

namespace cudasim::test {
namespace {

// Values by hand, from the descriptions in the manual.
struct Case {
  const char* body;
  u64 a, b, c;
  u64 expected;  // in the destination that the body writes
};

u64 result_of(const Result& r, const std::string& body) {
  if (body.find("%l0") != std::string::npos) return r.l;
  return body.find("%r0") != std::string::npos ? r.r : r.h;
}

const Case kCases[] = {
    {"add.s32 %r0, %ra, %rb;", 0x7fffffff, 1, 0, 0x80000000},
    {"add.sat.s32 %r0, %ra, %rb;", 0x7fffffff, 1, 0, 0x7fffffff},
    {"sub.sat.s32 %r0, %ra, %rb;", 0x80000000, 1, 0, 0x80000000},
    {"add.u16 %h0, %ha, %hb;", 0xffff, 2, 0, 1},
    {"sub.u64 %l0, %la, %lb;", 0, 1, 0, ~0ull},
    {"mul.lo.s32 %r0, %ra, %rb;", 0x12345678, 0x9abcdef0, 0, 0x242d2080},
    {"mul.hi.u32 %r0, %ra, %rb;", 0xffffffff, 0xffffffff, 0, 0xfffffffe},
    {"mul.hi.s32 %r0, %ra, %rb;", 0xffffffff, 0xffffffff, 0, 0},
    {"mul.hi.u64 %l0, %la, %lb;", ~0ull, ~0ull, 0, ~0ull - 1},
    {"mul.hi.s64 %l0, %la, %lb;", ~0ull, 2, 0, ~0ull},
    {"mul.wide.s32 %l0, %ra, %rb;", 0xffffffff, 3, 0, static_cast<u64>(-3)},
    {"mul.wide.u32 %l0, %ra, %rb;", 0xffffffff, 3, 0, 0x2fffffffdull},
    {"mul.wide.s16 %r0, %ha, %hb;", 0x8000, 0x8000, 0, 0x40000000},
    {"mad.lo.s32 %r0, %ra, %rb, %rc;", 7, 0xfffffffe, 20, 6},
    {"mad.wide.u32 %l0, %ra, %rb, %lc;", 0xffffffff, 2, 2, 0x200000000ull},
    {"mad.hi.u32 %r0, %ra, %rb, %rc;", 0x80000000, 4, 5, 7},
    {"mul24.lo.s32 %r0, %ra, %rb;", 0xff7fffff, 2, 0, 0xfffffe},
    {"div.s32 %r0, %ra, %rb;", static_cast<u32>(-7), 2, 0, static_cast<u32>(-3)},
    {"rem.s32 %r0, %ra, %rb;", static_cast<u32>(-7), 2, 0, static_cast<u32>(-1)},
    {"div.u32 %r0, %ra, %rb;", 0xfffffff9, 2, 0, 0x7ffffffc},
    {"div.s64 %l0, %la, %lb;", 1ull << 63, ~0ull, 0, 1ull << 63},
    {"rem.u64 %l0, %la, %lb;", ~0ull, 10, 0, 5},
    {"sad.s32 %r0, %ra, %rb, %rc;", static_cast<u32>(-5), 4, 10, 19},
    {"abs.s32 %r0, %ra;", static_cast<u32>(-5), 0, 0, 5},
    {"neg.s64 %l0, %la;", 5, 0, 0, static_cast<u64>(-5)},
    {"min.s32 %r0, %ra, %rb;", 0xffffffff, 1, 0, 0xffffffff},
    {"min.u32 %r0, %ra, %rb;", 0xffffffff, 1, 0, 1},
    {"max.s16 %h0, %ha, %hb;", 0xffff, 1, 0, 1},
    {"dp4a.s32.s32 %r0, %ra, %rb, %rc;", 0xff020304, 0x0102ff7f, 100, 100 - 1 + 4 - 3 + 4 * 127},
    {"dp4a.u32.u32 %r0, %ra, %rb, %rc;", 0xff020304, 0x0102ff7f, 100,
     100 + 255 + 4 + 3 * 255 + 4 * 127},
    {"dp4a.u32.s32 %r0, %ra, %rb, %rc;", 0xff000000, 0xff000000, 0, static_cast<u32>(-255)},
    {"dp2a.lo.s32.s32 %r0, %ra, %rb, %rc;", 0xffff0003, 0x12340205, 7, 7 - 2 + 15},
    {"dp2a.hi.s32.s32 %r0, %ra, %rb, %rc;", 0xffff0003, 0x02051234, 7, 7 - 2 + 15},
    {"and.b32 %r0, %ra, %rb;", 0xff00ff00, 0x0ff00ff0, 0, 0x0f000f00},
    {"xor.b64 %l0, %la, %lb;", ~0ull, 1, 0, ~0ull - 1},
    {"not.b16 %h0, %ha;", 0x00ff, 0, 0, 0xff00},
    {"cnot.b32 %r0, %ra;", 0, 0, 0, 1},
    {"shl.b32 %r0, %ra, %rb;", 1, 32, 0, 0},
    {"shl.b64 %l0, %la, %rb;", 1, 63, 0, 1ull << 63},
    {"shr.s32 %r0, %ra, %rb;", 0x80000000, 40, 0, 0xffffffff},
    {"shr.u32 %r0, %ra, %rb;", 0x80000000, 31, 0, 1},
    {"shr.s16 %h0, %ha, %rb;", 0x8000, 15, 0, 0xffff},
    {"shf.l.wrap.b32 %r0, %ra, %rb, %rc;", 0x80000001, 0x12345678, 36, 0x23456788},
    {"shf.l.clamp.b32 %r0, %ra, %rb, %rc;", 0x80000001, 0x12345678, 36, 0x80000001},
    {"shf.r.wrap.b32 %r0, %ra, %rb, %rc;", 0x12345678, 0x9abcdef0, 36, 0x01234567},
    {"shf.r.clamp.b32 %r0, %ra, %rb, %rc;", 0x12345678, 0x9abcdef0, 36, 0x9abcdef0},
    {"lop3.b32 %r0, %ra, %rb, %rc, 0x80;", 0xf0f0f0f0, 0xcccccccc, 0xaaaaaaaa, 0x80808080},
    {"lop3.b32 %r0, %ra, %rb, %rc, 0xe8;", 0xf0f0f0f0, 0xcccccccc, 0xaaaaaaaa, 0xe8e8e8e8},
    {"lop3.b32 %r0, %ra, %rb, %rc, 0x1b;", 0xf0f0f0f0, 0xcccccccc, 0xaaaaaaaa, 0x1b1b1b1b},
    {"popc.b64 %r0, %la;", 0xff000000000000ffull, 0, 0, 16},
    {"clz.b32 %r0, %ra;", 0x00010000, 0, 0, 15},
    {"clz.b32 %r0, %ra;", 0, 0, 0, 32},
    {"brev.b32 %r0, %ra;", 0x00000003, 0, 0, 0xc0000000},
    {"bfind.u32 %r0, %ra;", 0, 0, 0, 0xffffffff},
    {"bfind.u32 %r0, %ra;", 0x00010000, 0, 0, 16},
    {"bfind.s32 %r0, %ra;", 0xfffffffe, 0, 0, 0},
    {"bfind.shiftamt.u32 %r0, %ra;", 0x00010000, 0, 0, 15},
    {"bfe.u32 %r0, %ra, %rb, %rc;", 0x12345678, 8, 12, 0x456},
    {"bfe.s32 %r0, %ra, %rb, %rc;", 0x00000f00, 8, 4, 0xffffffff},
    {"bfe.s32 %r0, %ra, %rb, %rc;", 0x80000000, 28, 8, 0xfffffff8},
    {"bfe.u32 %r0, %ra, %rb, %rc;", 0x80000000, 28, 8, 8},
    {"bfe.s32 %r0, %ra, %rb, %rc;", 0x80000000, 0, 0, 0},
    {"bfe.u64 %l0, %la, %rb, %rc;", 0xabcdull << 40, 40, 64, 0xabcd},
    {"bfi.b32 %r0, %ra, %rb, %rc, 8;", 0xabcd, 0xffffffff, 4, 0xfffffcdf},
    {"bfi.b32 %r0, %ra, %rb, %rc, 8;", 0xabcd, 0x11111111, 40, 0x11111111},
    {"prmt.b32 %r0, %ra, %rb, %rc;", 0x33221100, 0x77665544, 0x7531, 0x77553311},
    {"prmt.b32 %r0, %ra, %rb, %rc;", 0x33221180, 0x77665544, 0x0889, 0x80ffff00},
    {"prmt.b32.f4e %r0, %ra, %rb, %rc;", 0x33221100, 0x77665544, 3, 0x66554433},
    {"prmt.b32.b4e %r0, %ra, %rb, %rc;", 0x33221100, 0x77665544, 1, 0x66770011},
    {"prmt.b32.rc8 %r0, %ra, %rb, %rc;", 0x33221100, 0x77665544, 2, 0x22222222},
    {"prmt.b32.ecl %r0, %ra, %rb, %rc;", 0x33221100, 0x77665544, 2, 0x33222222},
    {"prmt.b32.ecr %r0, %ra, %rb, %rc;", 0x33221100, 0x77665544, 1, 0x11111100},
    {"prmt.b32.rc16 %r0, %ra, %rb, %rc;", 0x33221100, 0x77665544, 1, 0x33223322},
    {"{ add.cc.u32 %r1, %ra, %rb; addc.u32 %r0, %rc, 0; }", 0xffffffff, 1, 5, 6},
    {"{ sub.cc.u32 %r1, %ra, %rb; subc.u32 %r0, %rc, 0; }", 0, 1, 5, 4},
    {"{ mad.lo.cc.u32 %r1, %ra, %rb, %ra; madc.hi.u32 %r0, %ra, %rb, %rc; }", 0xffffffff, 2, 1,
     // 2 (2^32 - 1) + 2^32 - 1 = 3 · 2^32 - 3: low word carries once.
     1 + 1 + 1},
    {"cvt.s32.s8 %r0, %ra;", 0x180, 0, 0, 0xffffff80},
    {"cvt.u32.u8 %r0, %ra;", 0x180, 0, 0, 0x80},
    {"cvt.sat.s8.s32 %r0, %ra;", 1000, 0, 0, 127},
    {"cvt.sat.u8.s32 %r0, %ra;", static_cast<u32>(-5), 0, 0, 0},
    {"cvt.s64.s32 %l0, %ra;", 0x80000000, 0, 0, 0xffffffff80000000ull},
    {"cvt.u64.u32 %l0, %ra;", 0x80000000, 0, 0, 0x80000000ull},
    // Operand size exceeding instruction-type size: the source is truncated, then converted; the
    // result is extended by the sign of the destination type.
    {"cvt.s64.s32 %l0, %la;", 0x12345678'80000000ull, 0, 0, 0xffffffff80000000ull},
    {"cvt.s64.s32 %l0, %la;", 0xffffffff'7fffffffull, 0, 0, 0x7fffffff},
    {"cvt.u64.u32 %l0, %la;", 0x12345678'80000000ull, 0, 0, 0x80000000ull},
    {"cvt.s32.s16 %r0, %la;", 0x12345678'00018000ull, 0, 0, 0xffff8000},
    {"cvt.s16.s8 %h0, %la;", 0x12345678'00018180ull, 0, 0, 0xff80},
    {"cvt.sat.u8.s32 %r0, %la;", 0x1'fffffffbull, 0, 0, 0},
    {"cvt.sat.s8.u16 %r0, %la;", 0xabcd'0001'00ffull, 0, 0, 127},
    {"cvt.u32.u64 %l0, %la;", 0x12345678'80000001ull, 0, 0, 0x80000001ull},
    {"mov.b32 %r0, {%ha, %hb};", 0x1234, 0xabcd, 0, 0xabcd1234},
    {"mov.b64 %l0, {%ra, %rb};", 1, 2, 0, 0x200000001ull},
    {"mov.b32 {%h1, %h0}, %ra;", 0xabcd1234, 0, 0, 0xabcd},
    {"mov.b64 {_, %r0}, %la;", 0xabcd1234'00000001ull, 0, 0, 0xabcd1234},
    {"{ setp.lt.s32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", 0xffffffff, 0, 0, 1},
    {"{ setp.lo.u32 %p, %ra, %rb; selp.b32 %r0, 1, 2, %p; }", 0xffffffff, 0, 0, 2},
    {"{ setp.eq.s32 %q, %rc, 9; setp.gt.and.s32 %p, %ra, %rb, !%q; selp.b32 %r0, 1, 2, %p; }", 2, 1,
     9, 2},
    {"{ setp.gt.s32 %p|%q, %ra, %rb; selp.b32 %r0, 1, 2, %q; }", 2, 1, 0, 2},
    {"set.ge.u32.s32 %r0, %ra, %rb;", 3, 3, 0, 0xffffffff},
    {"slct.u32.s32 %r0, %ra, %rb, %rc;", 1, 2, 0xffffffff, 2},
    {"{ setp.ne.s32 %p, %ra, 0; not.pred %q, %p; and.pred %p, %p, %q; selp.b32 %r0, 1, 2, %p; }", 5,
     0, 0, 2},
};

TEST(Integer, FollowsTheManual) {
  for (const Case& c : kCases) {
    EXPECT_EQ(result_of(run_lanes(c.body, {{c.a, c.b, c.c}})[0], c.body), c.expected) << c.body;
  }
}

TEST(Integer, EveryInstructionExists) {
  std::string all;
  for (const Case& c : kCases) all += std::string(c.body) + "\n";
  EXPECT_TRUE(assembles(lane_kernel(all)));
}

// Field extraction against the loop in the manual, bit by bit.
TEST(Integer, BitFieldsEqualTheManualsLoop) {
  std::mt19937 random(1);
  for (int round = 0; round < 20; ++round) {
    std::vector<Lane> lanes(32);
    for (auto& l : lanes) l = {random(), random() % 40, random() % 40};
    for (const bool is_signed : {false, true}) {
      const auto got = run_lanes(
          is_signed ? "bfe.s32 %r0, %ra, %rb, %rc;" : "bfe.u32 %r0, %ra, %rb, %rc;", lanes);
      for (std::size_t k = 0; k < lanes.size(); ++k) {
        const u64 a = lanes[k].a, pos = lanes[k].b, len = lanes[k].c;
        const bool sign = is_signed && len != 0 && (a >> std::min<u64>(pos + len - 1, 31) & 1) != 0;
        u32 expected = 0;
        for (u64 i = 0; i <= 31; ++i) {
          const bool bit = i < len && pos + i <= 31 ? (a >> (pos + i) & 1) != 0 : sign;
          expected |= static_cast<u32>(bit) << i;
        }
        EXPECT_EQ(got[k].r, expected) << a << ' ' << pos << ' ' << len << ' ' << is_signed;
      }
    }
  }
}

TEST(Integer, LanesThatAreOffKeepTheirValue) {
  std::vector<Lane> lanes(32);
  for (u32 k = 0; k < 32; ++k) lanes[k] = {k, 100, 0};
  const auto got = run_lanes(
      "mov.b32 %r0, 7; setp.gt.u32 %p, %ra, 15; @%p add.s32 %r0, %ra, %rb; @!%p mov.b64 %l0, 3;",
      lanes);
  for (u32 k = 0; k < 32; ++k) {
    EXPECT_EQ(got[k].r, k > 15 ? k + 100 : 7);
    EXPECT_EQ(got[k].l, k > 15 ? 0u : 3u);
  }
}

TEST(Decode, UnknownOpcodesAndModifiersStopWithTheirText) {
  for (const char* body : {"vadd.s32.s32.s32 %r0, %ra, %rb;", "add.wrong.s32 %r0, %ra, %rb;",
                           "ld.global.strange.u32 %r0, [%la];", "mov.u32 %r0, %nonsense;",
                           "wgmma.fence.sync.aligned;", "min.f64.odd %l0, %la, %lb;"}) {
    PtxDevice device;
    try {
      device.run(lane_kernel(body), {0, 0});
      ADD_FAILURE() << body << " was taken";
    } catch (const Error& e) {
      const std::string opcode = std::string(body).substr(0, std::string(body).find_first_of(" ;"));
      EXPECT_NE(std::string(e.what()).find(opcode), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace cudasim::test
