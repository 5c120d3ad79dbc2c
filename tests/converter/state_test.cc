#include "converter/state.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "tests/converter/packed_case.h"
#include "tests/converter/scratch_folder.h"
#include "tests/models/mixture_case.h"

namespace moesaic::converter {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFingerprint = R"({"active": 0.5, "seed": 7, "recipe": "fast"})";

struct StateTest : testing::Test {
  ScratchFolder scratch;
  fs::path output = scratch.path / "out.gguf";
  fs::path folder = scratch.path / "out.gguf.state";
  models::ModelConfig config = small_config(3);

  void save_one_layer() {
    StateFolder state(output, kFingerprint, false);
    const auto packed = packed_layer(1);
    state.save_layer(packed_report(0, packed), packed, config);
  }
};

bool same(const WeightView& a, const WeightView& b) {
  return a.dtype == b.dtype && a.rows == b.rows && a.cols == b.cols &&
         (a.empty() || std::memcmp(a.data, b.data, static_cast<std::size_t>(a.bytes())) == 0);
}

bool same(std::span<const float> a, std::span<const float> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

TEST_F(StateTest, LayerComesBackWhole) {
  const auto packed = packed_layer(3);
  const LayerReport report = packed_report(1, packed);
  {
    StateFolder state(output, kFingerprint, false);
    state.save_layer(report, packed, config);
  }
  const StateFolder state(output, kFingerprint, true);
  EXPECT_FALSE(state.load_layer(0, config));
  const auto saved = state.load_layer(1, config);
  ASSERT_TRUE(saved);
  ASSERT_TRUE(saved->mlp);
  const kernels::SecretMoeView a = packed.view();
  const kernels::SecretMoeView& b = std::get<kernels::SecretMoeView>(*saved->mlp);
  EXPECT_EQ(a.phi, b.phi);
  EXPECT_EQ(a.n_active, b.n_active);
  EXPECT_TRUE(same(a.shared, b.shared));
  EXPECT_TRUE(same(a.experts, b.experts));
  EXPECT_TRUE(same(a.router_v, b.router_v));
  EXPECT_TRUE(same(a.router_u, b.router_u));
  EXPECT_TRUE(same(a.bypass_q, b.bypass_q));
  EXPECT_TRUE(same(a.bypass_p, b.bypass_p));
  EXPECT_TRUE(same(a.expert_mean, b.expert_mean));
  EXPECT_TRUE(same(a.router_bias, b.router_bias));
  EXPECT_TRUE(same(a.bias, b.bias));

  const LayerReport& r = saved->report;
  EXPECT_EQ(r.layer, 1);
  EXPECT_EQ(r.kind, report.kind);
  EXPECT_EQ(r.n_shared, report.n_shared);
  EXPECT_EQ(r.n_experts, report.n_experts);
  EXPECT_EQ(r.n_active, report.n_active);
  EXPECT_EQ(r.router_rank, report.router_rank);
  EXPECT_EQ(r.bypass_rank, report.bypass_rank);
  EXPECT_EQ(r.active_fraction, report.active_fraction);
  EXPECT_EQ(r.sensitivity, report.sensitivity);
  EXPECT_EQ(r.error_closed_form, report.error_closed_form);
  EXPECT_EQ(r.error_distilled, report.error_distilled);
  EXPECT_EQ(r.expert_usage, report.expert_usage);
}

TEST_F(StateTest, LayerWithoutSharedNeuronsAndBypass) {
  StateFolder state(output, kFingerprint, false);
  const auto packed = packed_layer(3, 0, 0);
  const SavedLayer saved = state.save_layer(packed_report(2, packed), packed, config);
  ASSERT_TRUE(saved.mlp);
  EXPECT_EQ(std::get<kernels::SecretMoeView>(*saved.mlp).n_shared(), 0);
  EXPECT_EQ(std::get<kernels::SecretMoeView>(*saved.mlp).bypass_rank(), 0);
}

TEST_F(StateTest, MixtureComesBackWhole) {
  const models::PackedMixture packed = models::packed_mixture(
      {kernels::ExpertKind::Gelu, kernels::RouterKind::ProductKey, kernels::GateKind::Softmax}, 4,
      config.d_model);
  LayerReport report = dense_report(1);
  report.kind = models::kind_name(packed.kind);
  report.n_active = packed.n_active;
  {
    StateFolder state(output, kFingerprint, false);
    state.save_layer(report, packed, config);
  }
  const StateFolder state(output, kFingerprint, true);
  const auto saved = state.load_layer(1, config);
  ASSERT_TRUE(saved && saved->mlp);
  const kernels::MixtureView a = packed.view();
  const auto& b = std::get<kernels::MixtureView>(*saved->mlp);
  EXPECT_EQ(a.kind, b.kind);
  EXPECT_TRUE(same(a.shared, b.shared));
  EXPECT_TRUE(same(a.experts, b.experts));
  EXPECT_TRUE(same(a.expert_bias, b.expert_bias));
  EXPECT_TRUE(same(a.router_v, b.router_v));
  EXPECT_TRUE(same(a.router_u, b.router_u));
  EXPECT_TRUE(same(a.bias, b.bias));
  const LayerReport& r = saved->report;
  EXPECT_EQ(r.kind, "gelu+product_key+softmax");
  EXPECT_EQ(r.n_experts, 9);
  EXPECT_EQ(r.n_active, 2);
  EXPECT_EQ(r.n_shared, 3);
  EXPECT_EQ(r.expert_neurons, 4);
  EXPECT_EQ(r.router_rank, 32);
  EXPECT_EQ(r.d_ff, config.d_ff);
}

TEST_F(StateTest, DenseLayerComesBack) {
  LayerReport report = dense_report(1);
  report.error_distilled = std::numeric_limits<double>::quiet_NaN();
  {
    StateFolder state(output, kFingerprint, false);
    const SavedLayer saved = state.save_dense_layer(report);
    EXPECT_FALSE(saved.mlp);
    EXPECT_EQ(saved.file, nullptr);
  }
  const StateFolder state(output, kFingerprint, true);
  const auto saved = state.load_layer(1, config);
  ASSERT_TRUE(saved);
  EXPECT_EQ(saved->file, nullptr);
  EXPECT_FALSE(saved->mlp);
  EXPECT_EQ(saved->report.kind, "dense");
  EXPECT_EQ(saved->report.sensitivity, 0.5);
  EXPECT_TRUE(std::isnan(saved->report.error_distilled));
}

TEST_F(StateTest, CalibrationPlanAndTimeComeBack) {
  const std::vector<std::int32_t> tokens = {1, 0, 49151, 262143};
  {
    StateFolder state(output, kFingerprint, false);
    EXPECT_FALSE(state.load_calibration());
    EXPECT_FALSE(state.load_plan());
    EXPECT_EQ(state.seconds(), 0);
    state.save_calibration(tokens);
    state.save_plan("[1, 2]");
    state.add_seconds(1.5);
    state.add_seconds(2.25);
  }
  StateFolder state(output, kFingerprint, true);
  EXPECT_EQ(state.load_calibration(), tokens);
  EXPECT_EQ(state.load_plan(), "[1, 2]");
  EXPECT_EQ(state.seconds(), 3.75);
}

TEST_F(StateTest, LeftoversOfAKilledRunAreIgnoredAndRemoved) {
  save_one_layer();
  // No process has this id: Linux gives none above 2^22.
  write_text(folder / ".layer-001.gguf.99999999.0.tmp", "half a la");
  write_text(folder / ".job.json.99999999.3.tmp", "{");
  write_text(folder / ".calibration.u32.99999999.0.tmp", "abc");
  write_text(scratch.path / ".out.gguf.99999999.0.tmp", "half a hybrid");
  write_text(scratch.path / ".other.gguf.99999999.0.tmp", "not ours");
  write_text(scratch.path / (".out.gguf." + std::to_string(getpid()) + ".0.tmp"), "at work");
  write_text(folder / "calibration.u32", "1234");  // killed before calibration.json
  const StateFolder state(output, kFingerprint, true);
  EXPECT_TRUE(state.load_layer(0, config));
  EXPECT_FALSE(state.load_layer(1, config));
  EXPECT_FALSE(state.load_calibration());
  EXPECT_FALSE(fs::exists(folder / ".layer-001.gguf.99999999.0.tmp"));
  EXPECT_FALSE(fs::exists(folder / ".job.json.99999999.3.tmp"));
  EXPECT_FALSE(fs::exists(scratch.path / ".out.gguf.99999999.0.tmp"));
  EXPECT_TRUE(fs::exists(scratch.path / ".other.gguf.99999999.0.tmp"));
  EXPECT_TRUE(fs::exists(scratch.path / (".out.gguf." + std::to_string(getpid()) + ".0.tmp")));
}

TEST_F(StateTest, EmptyFolderOfAKilledRunIsTakenWithOrWithoutResume) {
  for (const bool resume : {false, true}) {
    fs::create_directory(folder);
    StateFolder state(output, kFingerprint, resume);
    EXPECT_TRUE(fs::exists(folder / "job.json"));
    state.remove();
    EXPECT_FALSE(fs::exists(folder));
  }
}

TEST_F(StateTest, ResumeWithoutAFolderStartsOne) {
  const StateFolder state(output, kFingerprint, true);
  EXPECT_TRUE(fs::is_directory(folder));
}

TEST_F(StateTest, FinishedLayersWithoutResumeTellBothWaysOut) {
  save_one_layer();
  const std::string text =
      thrown<InputError>([&] { StateFolder state(output, kFingerprint, false); });
  EXPECT_NE(text.find("out.gguf.state: holds 1 finished layer of an earlier run"), text.npos);
  EXPECT_NE(text.find("--resume"), text.npos);
  EXPECT_NE(text.find("remove the folder"), text.npos);
  const StateFolder state(output, kFingerprint, true);  // and nothing was lost
  EXPECT_TRUE(state.load_layer(0, config));
}

TEST_F(StateTest, NothingFinishedWithoutResumeStartsOver) {
  {
    StateFolder state(output, R"({"active": 0.4})", false);
    state.save_calibration({1, 2, 3});
    state.save_plan("[]");
    state.add_seconds(10);
  }
  const StateFolder state(output, kFingerprint, false);
  EXPECT_FALSE(state.load_calibration());
  EXPECT_FALSE(state.load_plan());
  EXPECT_EQ(state.seconds(), 0);
}

TEST_F(StateTest, FingerprintMismatchNamesTheFields) {
  save_one_layer();
  const std::string text = thrown<InputError>(
      [&] { StateFolder state(output, R"({"active": 0.6, "seed": 7, "tokens": 1024})", true); });
  EXPECT_NE(text.find("out.gguf.state: holds another conversion"), text.npos) << text;
  EXPECT_NE(text.find("active is 0.5 there, 0.6 now"), text.npos) << text;
  EXPECT_NE(text.find("tokens is missing there, 1024 now"), text.npos) << text;
  EXPECT_NE(text.find("recipe is \"fast\" there, missing now"), text.npos) << text;
  EXPECT_EQ(text.find("seed"), text.npos) << text;
  EXPECT_EQ(text.find('\n'), text.npos) << text;
}

TEST_F(StateTest, OrderAndSpacingOfTheFingerprintDoNotMatter) {
  save_one_layer();
  const StateFolder state(output, R"({"recipe":"fast","seed":7,"active":0.5})", true);
  EXPECT_TRUE(state.load_layer(0, config));
}

TEST_F(StateTest, DamagedLayerIsNamedWithTheWayOut) {
  save_one_layer();
  const fs::path file = folder / "layer-000.gguf";
  const std::string whole = read_text(file);
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{3}, whole.size() / 2, whole.size() - 64}) {
    write_text(file, whole.substr(0, size));
    const StateFolder state(output, kFingerprint, true);
    const std::string text = thrown<FormatError>([&] { (void)state.load_layer(0, config); });
    EXPECT_NE(text.find("layer-000.gguf: damaged ("), text.npos) << text;
    EXPECT_NE(text.find("remove this file and run again with --resume"), text.npos) << text;
    EXPECT_EQ(text.find('\n'), text.npos) << text;
  }
}

TEST_F(StateTest, LayerFileOfAnotherLayerOrModel) {
  save_one_layer();
  fs::copy_file(folder / "layer-000.gguf", folder / "layer-001.gguf");
  const StateFolder state(output, kFingerprint, true);
  EXPECT_THROW((void)state.load_layer(1, config), FormatError);
  models::ModelConfig other = config;
  other.d_model = 32;
  EXPECT_THROW((void)state.load_layer(0, other), FormatError);
  EXPECT_THROW((void)state.load_layer(0, small_config(5)), FormatError);
}

TEST_F(StateTest, DamagedJobCalibrationPlanAndTime) {
  {
    StateFolder state(output, kFingerprint, false);
    const auto packed = packed_layer(1);
    state.save_layer(packed_report(0, packed), packed, config);
    state.save_calibration({1, 2, 3, 4});
    state.save_plan("[]");
    state.add_seconds(1);
  }
  write_text(folder / "calibration.u32", "12345678");
  write_text(folder / "plan.json", "[{\"lay");
  write_text(folder / "time.json", "");
  {
    const StateFolder state(output, kFingerprint, true);
    EXPECT_NE(thrown<FormatError>([&] {
                (void)state.load_calibration();
              }).find("calibration.u32: damaged (SHA-256 is "),
              std::string::npos);
    EXPECT_NE(thrown<FormatError>([&] { (void)state.load_plan(); }).find("plan.json: damaged"),
              std::string::npos);
    EXPECT_NE(thrown<FormatError>([&] { (void)state.seconds(); }).find("time.json: damaged"),
              std::string::npos);
  }
  write_text(folder / "job.json", "{\"active\": 0.");
  EXPECT_NE(thrown<FormatError>([&] {
              StateFolder state(output, kFingerprint, true);
            }).find("job.json: damaged (no JSON object); remove "),
            std::string::npos);
  fs::remove(folder / "job.json");
  EXPECT_THROW(StateFolder(output, kFingerprint, true), FormatError);
}

TEST_F(StateTest, SecondProcessIsTurnedAway) {
  const StateFolder first(output, kFingerprint, false);
  EXPECT_NE(thrown<InputError>([&] {
              StateFolder second(output, kFingerprint, true);
            }).find("another conversion is at work"),
            std::string::npos);
}

TEST_F(StateTest, RemoveLeavesWhatIsNotOurs) {
  save_one_layer();
  write_text(folder / "notes.txt", "mine");
  StateFolder state(output, kFingerprint, true);
  state.remove();
  EXPECT_TRUE(fs::exists(folder / "notes.txt"));
  EXPECT_FALSE(fs::exists(folder / "job.json"));
  EXPECT_FALSE(fs::exists(folder / "layer-000.gguf"));
}

TEST_F(StateTest, FileInTheWayOrNoFolderToWriteTo) {
  write_text(folder, "a file");
  EXPECT_THROW(StateFolder(output, kFingerprint, false), IoError);
  EXPECT_THROW(StateFolder(scratch.path / "absent" / "out.gguf", kFingerprint, false), IoError);
}

}  // namespace
}  // namespace moesaic::converter
