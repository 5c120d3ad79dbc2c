#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/cudasim/count/bounds.h"

// The program `cudasim`, with a program that was linked with the system's libcudart.

namespace cudasim::test {
namespace {

struct Output {
  int status;
  std::string text;
};

Output shell(const std::string& command) {
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  Output out{-1, ""};
  char buffer[4096];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) out.text += buffer;
  const int s = pclose(pipe);
  out.status = WIFEXITED(s) ? WEXITSTATUS(s) : -1;
  return out;
}

const std::string kProgram = CUDASIM_PROGRAM;

TEST(Program, RunsAnUnmodifiedProgramAndCounts) {
  const std::string file = testing::TempDir() + "cudasim_counters.json";
  const Output out = shell(kProgram + " run --schedule 2 --counters " + file + " " CUDASIM_SPEED);
  ASSERT_EQ(out.status, 0) << out.text;
  nlohmann::json counters;
  std::ifstream(file) >> counters;
  EXPECT_EQ(counters["schedule"], 2);
  EXPECT_EQ(counters["process"]["kernel_launches"], 6);
  bool found = false;
  for (const auto& k : counters["kernels"]) {
    const std::string name = k["name"];
    if (name.starts_with("axpy")) {
      // 2^21 elements: x and y are read, y is written, by whole warps of neighbours.
      EXPECT_EQ(k["unique_read_bytes"], 2u << 23);
      EXPECT_EQ(k["unique_written_bytes"], 1u << 23);
      EXPECT_EQ(k["loads"]["sectors_per_ideal"], 1.0);
      EXPECT_EQ(k["loads"]["requests"], 2u << 16);
      EXPECT_EQ(k["stores"]["sectors"], 1u << 18);
      found = true;
    }
    if (name.starts_with("matvec")) {
      EXPECT_EQ(k["launches"], 4);
      // W once a launch, and x.
      EXPECT_EQ(k["unique_read_bytes"], 4u * (2048 * 4096 * 2 + 2048 * 4));
      EXPECT_EQ(k["unique_written_bytes"], 4u * 4096 * 4);
      EXPECT_EQ(k["instructions"]["barrier"], 4u * 4096);
    }
    if (name.starts_with("polynomial")) {
      EXPECT_GT(k["active_lanes"].get<double>(), 31.0);
    }
  }
  EXPECT_TRUE(found);
  const Output bounds = shell(kProgram + " bounds " + file);
  EXPECT_EQ(bounds.status, 0);
  for (const char* word : {"bound", "L4", "A100", "H100", "RTX 4090", "matvec", "memory"}) {
    EXPECT_NE(bounds.text.find(word), std::string::npos) << bounds.text;
  }
}

TEST(Program, UsageErrors) {
  EXPECT_EQ(shell(kProgram).status, 2);
  EXPECT_EQ(shell(kProgram + " run --nonsense 1 true").status, 2);
  EXPECT_EQ(shell(kProgram + " run").status, 2);
  EXPECT_EQ(shell(kProgram + " bounds /nowhere.json").status, 1);
  EXPECT_EQ(shell(kProgram + " run --schedule abc " CUDASIM_SPEED).status, 86);
}

TEST(Bounds, TheSlowestResourceDecides) {
  const Gpu gpu{"toy", 100, 1000, 2, 10};  // 100 B/s, 1000 flop/s, 80 warp instructions/s
  EXPECT_EQ(bound_of({200, 500, 8, 1}, gpu).seconds, 2.0);
  EXPECT_STREQ(bound_of({200, 500, 8, 1}, gpu).by, "memory");
  EXPECT_STREQ(bound_of({0, 3000, 80, 1}, gpu).by, "tensor");
  EXPECT_EQ(bound_of({0, 0, 160, 1}, gpu).seconds, 2.0);
  EXPECT_STREQ(bound_of({0, 0, 8, 60}, gpu).by, "shared");
}

TEST(Bounds, TableNamesKernelsAndFiles) {
  const std::string path = testing::TempDir() + "bounds.json";
  const auto table_of = [&](const std::string& text) {
    std::ofstream(path) << text;
    return bounds_table(path);
  };
  const nlohmann::json kernel = {
      {"name", "void a::b::(anonymous namespace)::dot_kernel<a::Q4, (int)8>(float*, long)"},
      {"launches", 3},
      {"unique_read_bytes", 300},
      {"unique_written_bytes", 0},
      {"mma_flops", 0},
      {"warp_instructions", 1},
      {"shared_wavefronts", 0}};
  const std::string table = table_of(nlohmann::json({{"kernels", {kernel}}}).dump());
  EXPECT_NE(table.find("| `a::b::dot_kernel<a::Q4, (int)8>` | 3 |"), std::string::npos) << table;
  for (const char* text : {"", "[]", "{}", R"({"kernels": [{}]})"}) {
    try {
      table_of(text);
      ADD_FAILURE() << text;
    } catch (const std::exception& e) {
      EXPECT_NE(std::string(e.what()).find(path), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace cudasim::test
