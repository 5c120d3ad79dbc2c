#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/models/tiny_model.h"

namespace moesaic::tools {

/// What a run of the program left.
struct ProgramRun {
  int status = 0;  // exit status; 128 + signal where one killed it
  std::string out, err;

  nlohmann::json json() const { return nlohmann::json::parse(out); }
};

/// Runs the built program ($MOESAIC_PROGRAM) and waits for it.
ProgramRun run_program(const std::vector<std::string>& arguments);
/// The same with standard output going to a file instead (/dev/full).
ProgramRun run_program_to(const std::filesystem::path& output,
                          const std::vector<std::string>& arguments);
/// The same with nobody reading standard output.
ProgramRun run_program_to_closed_pipe(const std::vector<std::string>& arguments);
/// Sends `signal` once the program has said `when` on standard error, then waits for it.
ProgramRun run_program_and_signal(const std::vector<std::string>& arguments,
                                  const std::string& when, int signal);

/// One line that begins "moesaic: error: " is all there is on standard error.
void expect_one_line_error(const ProgramRun& run, int status, const std::string& part);

/// A folder that goes with the object.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// Writes a file and returns its path.
  std::string write(const std::string& name, const std::string& bytes) const;
  /// Names of the entries, sorted.
  std::vector<std::string> entries() const;

 private:
  std::filesystem::path path_;
};

/// Gives a tiny checkpoint a byte-level vocabulary that spells lower-case words, digits and some
/// punctuation; <|endoftext|>, <|im_start|> and <|im_end|> are special. `bos`: has a BOS token.
void add_vocabulary(models::TinyModel& model, bool bos = true);

/// Lower-case words, the same every time: at least n_bytes of them.
std::string words(std::size_t n_bytes);

/// A whole file; empty if it cannot be read.
std::string bytes(const std::string& path);

}  // namespace moesaic::tools
