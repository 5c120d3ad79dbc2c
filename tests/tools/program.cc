#include "tests/tools/program.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>

namespace moesaic::tools {
namespace {

struct Pipe {
  Pipe() {
    if (pipe2(ends.data(), O_CLOEXEC) != 0) throw std::runtime_error("pipe");
  }
  ~Pipe() {
    close_read();
    close_write();
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  void close_read() { close_end(0); }
  void close_write() { close_end(1); }
  void close_end(std::size_t i) {
    if (ends[i] >= 0) close(ends[i]);
    ends[i] = -1;
  }
  std::array<int, 2> ends{-1, -1};
};

/// Starts the program with the given descriptors as standard output and error.
pid_t start(const std::vector<std::string>& arguments, int out, int err) {
  const char* program = std::getenv("MOESAIC_PROGRAM");
  if (program == nullptr) throw std::runtime_error("MOESAIC_PROGRAM is not set");
  std::vector<char*> argv = {const_cast<char*>(program)};
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork");
  if (child == 0) {
    const int null = open("/dev/null", O_RDONLY);
    dup2(null, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(err, STDERR_FILENO);
    execv(program, argv.data());
    _exit(127);
  }
  return child;
}

/// Reads both descriptors to their ends; `on_error_text` is called as standard error grows.
void read_both(int out, int err, ProgramRun& run, const std::function<void()>& on_error_text) {
  std::array<pollfd, 2> fds = {pollfd{out, POLLIN, 0}, pollfd{err, POLLIN, 0}};
  std::array<std::string*, 2> texts = {&run.out, &run.err};
  while (fds[0].fd >= 0 || fds[1].fd >= 0) {
    if (poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) throw std::runtime_error("poll");
    for (std::size_t i = 0; i < fds.size(); ++i) {
      if (fds[i].fd < 0 || fds[i].revents == 0) continue;
      std::array<char, 4096> buffer;
      const ssize_t n = read(fds[i].fd, buffer.data(), buffer.size());
      if (n <= 0) {
        fds[i].fd = -1;
        continue;
      }
      texts[i]->append(buffer.data(), static_cast<std::size_t>(n));
      if (i == 1) on_error_text();
    }
  }
}

int wait_for(pid_t child) {
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

ProgramRun run_program_and_signal(const std::vector<std::string>& arguments,
                                  const std::string& when, int signal) {
  ProgramRun run;
  Pipe out, err;
  const pid_t child = start(arguments, out.ends[1], err.ends[1]);
  out.close_write();
  err.close_write();
  bool sent = signal == 0;
  read_both(out.ends[0], err.ends[0], run, [&] {
    if (sent || run.err.find(when) == std::string::npos) return;
    kill(child, signal);
    sent = true;
  });
  run.status = wait_for(child);
  return run;
}

ProgramRun run_program(const std::vector<std::string>& arguments) {
  return run_program_and_signal(arguments, "", 0);
}

ProgramRun run_program_to(const std::filesystem::path& output,
                          const std::vector<std::string>& arguments) {
  ProgramRun run;
  Pipe err;
  const int out = open(output.c_str(), O_WRONLY | O_CLOEXEC);
  if (out < 0) throw std::runtime_error("open " + output.string());
  const pid_t child = start(arguments, out, err.ends[1]);
  close(out);
  err.close_write();
  read_both(-1, err.ends[0], run, [] {});
  run.status = wait_for(child);
  return run;
}

ProgramRun run_program_to_closed_pipe(const std::vector<std::string>& arguments) {
  ProgramRun run;
  Pipe out, err;
  out.close_read();
  const pid_t child = start(arguments, out.ends[1], err.ends[1]);
  out.close_write();
  err.close_write();
  read_both(-1, err.ends[0], run, [] {});
  run.status = wait_for(child);
  return run;
}

void expect_one_line_error(const ProgramRun& run, int status, const std::string& part) {
  EXPECT_EQ(run.status, status) << run.err;
  EXPECT_EQ(run.out, "");
  EXPECT_EQ(run.err.rfind("moesaic: error: ", 0), 0U) << run.err;
  EXPECT_EQ(std::count(run.err.begin(), run.err.end(), '\n'), 1) << run.err;
  EXPECT_NE(run.err.find(part), std::string::npos) << run.err << "expected: " << part;
}

TemporaryFolder::TemporaryFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "moesaic-test-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string TemporaryFolder::write(const std::string& name, const std::string& bytes) const {
  const std::filesystem::path file = path_ / name;
  std::ofstream(file, std::ios::binary) << bytes;
  return file.string();
}

std::vector<std::string> TemporaryFolder::entries() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path_)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

void add_vocabulary(models::TinyModel& model, bool bos) {
  using models::GgufValue;
  std::vector<std::string> tokens = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
  for (char c = 'a'; c <= 'z'; ++c) tokens.emplace_back(1, c);
  for (char c = '0'; c <= '9'; ++c) tokens.emplace_back(1, c);
  tokens.emplace_back("Ġ");  // space
  tokens.emplace_back("Ċ");  // newline
  for (const char c : {'.', ',', '<', '>', '|', '_', '?'}) tokens.emplace_back(1, c);
  tokens.emplace_back("th");
  while (tokens.size() < static_cast<std::size_t>(models::TinyModel::kVocab)) {
    tokens.push_back("unused" + std::to_string(tokens.size()));
  }
  std::vector<std::uint64_t> kinds(tokens.size(), 1);
  for (std::size_t i = 0; i < 3; ++i) kinds[i] = 3;
  model.set("tokenizer.ggml.model", GgufValue::string("gpt2"));
  model.set("tokenizer.ggml.pre", GgufValue::string("smollm"));
  model.set("tokenizer.ggml.tokens", GgufValue::string_array(tokens));
  model.set("tokenizer.ggml.token_type", GgufValue::u32_array(kinds));
  model.set("tokenizer.ggml.merges", GgufValue::string_array({"t h"}));
  model.set("tokenizer.ggml.eos_token_id", GgufValue::u32(2));
  model.set("tokenizer.ggml.add_bos_token", GgufValue::boolean(false));
  if (bos) model.set("tokenizer.ggml.bos_token_id", GgufValue::u32(1));
  model.set("tokenizer.chat_template",
            GgufValue::string("{% for message in messages %}{{'<|im_start|>' + message['role'] + "
                              "'\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"));
}

std::string words(std::size_t n_bytes) {
  constexpr std::array kWords = {"the", "river", "runs", "north", "of", "seven", "hills", "and"};
  std::string text;
  for (std::size_t i = 0; text.size() < n_bytes; ++i) {
    text += kWords[i * i % 7 % kWords.size()];
    text += i % 9 == 8 ? ".\n" : " ";
  }
  return text;
}

std::string bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

}  // namespace moesaic::tools
