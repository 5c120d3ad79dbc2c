#include "tests/cudasim/ptx/parser.h"

#include <bit>
#include <charconv>
#include <cstring>
#include <optional>
#include <unordered_map>

#include "tests/cudasim/ptx/lexer.h"

namespace cudasim::ptx {
namespace {

bool is_number(std::string_view t) { return !t.empty() && t[0] >= '0' && t[0] <= '9'; }

std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> parts;
  std::size_t start = 0;
  while (start <= text.size()) {
    const std::size_t dot = std::min(text.find('.', start), text.size());
    parts.emplace_back(text.substr(start, dot - start));
    start = dot + 1;
  }
  return parts;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : tokens_(lex(text)) {}

  Module module() {
    while (peek().kind != Token::Kind::End) top_level();
    return std::move(module_);
  }

 private:
  const Token& peek(std::size_t k = 0) const {
    return tokens_[std::min(at_ + k, tokens_.size() - 1)];
  }
  Token next() { return tokens_[std::min(at_++, tokens_.size() - 1)]; }
  bool accept(std::string_view t) {
    if (!peek().is(t)) return false;
    ++at_;
    return true;
  }
  void expect(std::string_view t) {
    if (!accept(t)) error("expected '{}'", t);
  }
  template <class... Args>
  [[noreturn]] void error(fmt::format_string<Args...> text, Args&&... args) const {
    fail("PTX line {}: {}, found '{}'", peek().line, fmt::format(text, std::forward<Args>(args)...),
         peek().text);
  }
  void skip_line(u32 line) {
    while (peek().line == line && peek().kind != Token::Kind::End) ++at_;
  }

  i64 integer() {
    const bool minus = accept("-");
    const Token t = next();
    const auto value = unsigned_of(t.text);
    if (!value) {
      --at_;
      error("expected an integer");
    }
    return minus ? -static_cast<i64>(*value) : static_cast<i64>(*value);
  }
  static std::optional<u64> unsigned_of(std::string_view t) {
    if (!is_number(t)) return std::nullopt;
    if (t.back() == 'U' && !(t.size() > 1 && (t[1] == 'f' || t[1] == 'F'))) t.remove_suffix(1);
    int base = 10;
    if (t.size() > 2 && t[0] == '0' && (t[1] == 'x' || t[1] == 'X')) {
      base = 16;
      t.remove_prefix(2);
    } else if (t.size() > 2 && t[0] == '0' && (t[1] == 'b' || t[1] == 'B')) {
      base = 2;
      t.remove_prefix(2);
    }
    u64 value = 0;
    const auto [end, code] = std::from_chars(t.data(), t.data() + t.size(), value, base);
    if (code != std::errc{} || end != t.data() + t.size()) return std::nullopt;
    return value;
  }

  void top_level() {
    const Token t = peek();
    if (t.is(".version") || t.is(".address_size")) {
      skip_line(t.line);
    } else if (t.is(".target")) {
      next();
      module_.target = peek().text;
      skip_line(t.line);
    } else if (t.is(".file")) {
      next();
      const auto id = static_cast<u32>(integer());
      std::string name(next().text);
      module_.files[id] = name.substr(name.rfind('/') + 1);
      skip_line(t.line);
    } else if (t.is(".section")) {
      while (!accept("{")) next();
      while (!accept("}")) next();
    } else if (t.is(".pragma") || t.is(".alias")) {
      while (!accept(";")) next();
    } else {
      declaration();
    }
  }

  void declaration() {
    bool is_extern = false;
    for (;; next()) {
      if (peek().is(".extern")) {
        is_extern = true;
      } else if (!peek().is(".visible") && !peek().is(".weak") && !peek().is(".common")) {
        break;
      }
    }
    if (accept(".entry")) {
      function(true);
    } else if (accept(".func")) {
      function(false);
    } else {
      for (auto& v : variables()) {
        v.is_extern = is_extern;
        module_.variables.push_back(std::move(v));
      }
    }
  }

  // .global .align 4 .b8 x[64] = {…}, y;
  std::vector<Variable> variables() {
    Variable v;
    if (!peek().text.starts_with(".")) error("expected a declaration");
    v.space = next().text.substr(1);
    if (v.space != "global" && v.space != "const" && v.space != "shared" && v.space != "local" &&
        v.space != "param") {
      fail("PTX line {}: state space .{} is not modelled", peek().line, v.space);
    }
    u64 element = 0;
    std::string type;
    parse_type(v, element, type);
    std::vector<Variable> all;
    do {
      all.push_back(declarator(v, element, type));
    } while (accept(","));
    expect(";");
    return all;
  }

  void parse_type(Variable& v, u64& element, std::string& type) {
    bool aligned = false;
    u64 vector = 1;
    for (;;) {
      if (accept(".align")) {
        v.align = static_cast<u64>(integer());
        aligned = true;
      } else if (accept(".attribute")) {
        while (!accept(")")) next();
      } else if (accept(".ptr")) {
        if (peek().is(".global") || peek().is(".shared") || peek().is(".const") ||
            peek().is(".local")) {
          next();
        }
        if (accept(".align")) integer();
      } else if (accept(".v2")) {
        vector = 2;
      } else if (accept(".v4")) {
        vector = 4;
      } else if (peek().text.starts_with(".")) {
        type = next().text.substr(1);
        element = type_size(type);
      } else {
        break;
      }
    }
    element *= vector;
    if (!aligned) v.align = element;
  }

  Variable declarator(Variable v, u64 element, const std::string& type) {
    v.name = next().text;
    u64 count = 1;
    while (accept("[")) {
      if (accept("]")) {
        v.unsized = true;
        continue;
      }
      count *= static_cast<u64>(integer());
      expect("]");
    }
    v.size = v.unsized ? 0 : element * count;
    if (accept("=")) initial(v, element, type);
    return v;
  }

  void initial(Variable& v, u64 element, const std::string& type) {
    if (accept("{")) {
      if (accept("}")) return;
      do {
        initial(v, element, type);
      } while (accept(","));
      expect("}");
      return;
    }
    const std::size_t offset = v.image.size();
    v.image.resize(offset + element);
    u64 bits = 0;
    if (is_number(peek().text) || peek().is("-")) {
      const Operand o = number();
      bits = o.value;
      if (o.kind == Operand::Kind::Float && o.is_double && type == "f32") {
        bits = std::bit_cast<u32>(static_cast<float>(std::bit_cast<double>(bits)));
      }
    } else {
      std::string symbol(next().text);
      if (symbol == "generic") {
        expect("(");
        symbol = next().text;
        expect(")");
      }
      i64 addend = 0;
      if (accept("+")) addend = integer();
      v.patches.push_back({offset, symbol, addend});
    }
    std::memcpy(v.image.data() + offset, &bits, std::min<std::size_t>(element, 8));
  }

  void function(bool is_entry) {
    Function f;
    f.is_entry = is_entry;
    f.parent_scope = {-1};
    if (peek().is("(")) f.results = parameter_list();
    f.name = next().text;
    if (peek().is("(")) f.parameters = parameter_list();
    for (;;) {
      if (accept(".maxntid") || accept(".reqntid")) {
        f.max_threads = 1;
        do {
          f.max_threads *= static_cast<u32>(integer());
        } while (accept(","));
      } else if (accept(".minnctapersm") || accept(".maxnreg") || accept(".maxnctapersm")) {
        integer();
      } else if (accept(".noreturn")) {
      } else if (peek().is(".explicitcluster") || peek().is(".reqnctapercluster") ||
                 peek().is(".maxclusterrank")) {
        f.has_cluster = true;
        next();
        while (is_number(peek().text) || peek().is(",")) next();
      } else if (accept(".pragma")) {
        while (!accept(";")) next();
      } else {
        break;
      }
    }
    if (!accept(";")) {
      f.has_body = true;
      body(f);
    }
    module_.functions.push_back(std::move(f));
  }

  std::vector<Variable> parameter_list() {
    std::vector<Variable> all;
    expect("(");
    while (!accept(")")) {
      Variable v;
      v.space = next().text.substr(1);
      if (v.space != "param") fail("PTX line {}: parameter in .{}", peek().line, v.space);
      u64 element = 0;
      std::string type;
      parse_type(v, element, type);
      all.push_back(declarator(v, element, type));
      accept(",");
    }
    return all;
  }

  struct Range {
    std::string type;
    u64 count;
  };
  struct Scope {
    int id;
    std::unordered_map<std::string, int> registers;       // name → index
    std::unordered_map<std::string, Range> ranges;        // prefix of %r<5>
    std::unordered_map<std::string, std::string> rename;  // variables of inner scopes
  };

  void body(Function& f) {
    expect("{");
    scopes_.assign(1, {0, {}, {}, {}});
    source_ = {};
    while (!scopes_.empty()) statement(f);
  }

  void statement(Function& f) {
    const Token t = peek();
    if (t.kind == Token::Kind::End) error("the body of {} has no end", f.name);
    if (accept("{")) {
      const int id = static_cast<int>(f.parent_scope.size());
      f.parent_scope.push_back(scopes_.back().id);
      scopes_.push_back({id, {}, {}, {}});
    } else if (accept("}")) {
      scopes_.pop_back();
    } else if (accept(";")) {
    } else if (t.is(".loc")) {
      location();
    } else if (t.is(".reg")) {
      registers(f);
    } else if (t.is(".pragma")) {
      while (!accept(";")) next();
    } else if (t.is(".branchtargets") || t.is(".calltargets") || t.is(".callprototype")) {
      error("directive {} without a label", t.text);
    } else if (t.text.starts_with(".")) {
      for (auto& v : variables()) {
        std::string name = v.name;
        if (scopes_.size() > 1) {
          name = fmt::format("{}@{}", v.name, scopes_.back().id);
          scopes_.back().rename[v.name] = name;
        }
        v.name = name;
        f.locals.push_back(std::move(v));
      }
    } else if (peek(1).is(":")) {
      const std::string name(next().text);
      expect(":");
      if (accept(".branchtargets")) {
        do {
          f.branch_targets[name].emplace_back(next().text);
        } while (accept(","));
        expect(";");
      } else {
        f.labels[{scopes_.back().id, name}] = static_cast<u32>(f.body.size());
      }
    } else {
      instruction(f);
    }
  }

  void location() {
    const u32 line = next().line;
    SourceLine at;
    at.file = static_cast<u32>(integer());
    at.line = static_cast<u32>(integer());
    at.column = static_cast<u32>(integer());
    source_ = at;
    while (peek().line == line && peek().kind != Token::Kind::End) {
      if (next().is("inlined_at")) {
        SourceLine up;
        up.file = static_cast<u32>(integer());
        up.line = static_cast<u32>(integer());
        up.column = static_cast<u32>(integer());
        if (up != at) module_.inlined_at[at] = up;
      }
    }
  }

  void registers(Function& f) {
    expect(".reg");
    std::string type(next().text.substr(1));
    type_size(type);
    do {
      std::string name(next().text);
      if (accept("<")) {
        scopes_.back().ranges[name] = {type, static_cast<u64>(integer())};
        expect(">");
      } else {
        scopes_.back().registers[name] = new_register(f, type, name);
      }
    } while (accept(","));
    expect(";");
  }

  static int new_register(Function& f, std::string type, std::string name) {
    f.registers.push_back({std::move(type), std::move(name)});
    return static_cast<int>(f.registers.size()) - 1;
  }

  // The register of that name in the innermost scope that has it, or -1.
  int find_register(Function& f, const std::string& name) {
    std::size_t digits = name.size();
    while (digits > 0 && name[digits - 1] >= '0' && name[digits - 1] <= '9') --digits;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto r = scope->registers.find(name); r != scope->registers.end()) {
        return r->second;
      }
      if (digits == name.size()) continue;
      const auto range = scope->ranges.find(name.substr(0, digits));
      if (range == scope->ranges.end()) continue;
      if (*unsigned_of(name.substr(digits)) >= range->second.count) continue;
      return scope->registers[name] = new_register(f, range->second.type, name);
    }
    return -1;
  }

  void instruction(Function& f) {
    Instruction i;
    i.line = peek().line;
    i.source = source_;
    i.scope = scopes_.back().id;
    const char* first = peek().text.data();
    if (accept("@")) {
      const bool negated = accept("!");
      i.guard = operand(f);
      i.guard.negated = negated;
      if (i.guard.kind != Operand::Kind::Register) error("expected a predicate");
    }
    i.op = split(next().text);
    while (!peek().is(";")) {
      i.args.push_back(operand(f));
      if (!accept(",") && !peek().is(";")) error("expected ',' or ';'");
    }
    const char* end = next().text.data();
    for (const char* c = first; c != end; ++c) {
      const bool space = *c == ' ' || *c == '\t' || *c == '\n' || *c == '\r';
      if (!space) {
        i.text += *c;
      } else if (!i.text.empty() && i.text.back() != ' ') {
        i.text += ' ';
      }
    }
    f.body.push_back(std::move(i));
  }

  Operand number() {
    Operand o;
    const bool minus = accept("-");
    const Token t = next();
    const std::string_view s = t.text;
    const bool hex_float = s.size() > 2 && s[0] == '0';
    if (hex_float && (s[1] == 'f' || s[1] == 'F' || s[1] == 'd' || s[1] == 'D')) {
      o.kind = Operand::Kind::Float;
      o.is_double = s[1] == 'd' || s[1] == 'D';
      std::from_chars(s.data() + 2, s.data() + s.size(), o.value, 16);
      if (minus) o.value ^= o.is_double ? 1ull << 63 : 1ull << 31;
    } else if (const auto value = unsigned_of(s)) {
      o.kind = Operand::Kind::Integer;
      o.value = minus ? -*value : *value;
    } else {
      double d = 0;
      const auto [last, code] = std::from_chars(s.data(), s.data() + s.size(), d);
      if (code != std::errc{} || last != s.data() + s.size()) {
        fail("PTX line {}: '{}' is no number", t.line, s);
      }
      o.kind = Operand::Kind::Float;
      o.is_double = true;
      o.value = std::bit_cast<u64>(minus ? -d : d);
    }
    return o;
  }

  Operand operand(Function& f) {
    Operand o;
    if (accept("!")) {
      o = operand(f);
      o.negated = true;
      return o;
    }
    if (peek().is("{") || peek().is("(")) {
      const std::string_view close = next().is("{") ? "}" : ")";
      o.kind = Operand::Kind::Vector;
      while (!accept(close)) {
        o.items.push_back(operand(f));
        accept(",");
      }
      return o;
    }
    if (accept("[")) {
      o.kind = Operand::Kind::Address;
      if (is_number(peek().text)) {
        o.offset = integer();
      } else {
        const Operand base = operand(f);
        if (base.kind == Operand::Kind::Register) {
          o.reg = base.reg;
        } else if (base.kind == Operand::Kind::Symbol) {
          o.name = base.name;
        } else {
          error("expected an address");
        }
        if (accept("+")) {
          o.offset = integer();
        } else if (peek().is("-")) {
          o.offset = integer();
        }
      }
      expect("]");
      return o;
    }
    if (is_number(peek().text) || peek().is("-")) return number();
    const Token t = next();
    if (t.kind != Token::Kind::Word) {
      --at_;
      error("expected an operand");
    }
    o.name = t.text;
    if (o.name == "_") {
      o.kind = Operand::Kind::Sink;
    } else if (const int reg = find_register(f, o.name); reg >= 0) {
      o.kind = Operand::Kind::Register;
      o.reg = reg;
      if (accept("|")) {
        const Operand second = operand(f);
        o.pair = second.kind == Operand::Kind::Register ? second.reg : -1;
      }
    } else if (o.name.starts_with("%")) {
      o.kind = Operand::Kind::Special;
      o.name.erase(0, 1);
    } else {
      o.kind = Operand::Kind::Symbol;
      for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
        const auto renamed = scope->rename.find(o.name);
        if (renamed == scope->rename.end()) continue;
        o.name = renamed->second;
        break;
      }
    }
    return o;
  }

  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  Module module_;
  std::vector<Scope> scopes_;
  SourceLine source_;
};

}  // namespace

u64 type_size(std::string_view type) {
  static const std::unordered_map<std::string_view, u64> sizes = {
      {"pred", 4},  {"b8", 1},     {"u8", 1},  {"s8", 1},  {"b16", 2}, {"u16", 2}, {"s16", 2},
      {"f16", 2},   {"bf16", 2},   {"b32", 4}, {"u32", 4}, {"s32", 4}, {"f32", 4}, {"tf32", 4},
      {"f16x2", 4}, {"bf16x2", 4}, {"b64", 8}, {"u64", 8}, {"s64", 8}, {"f64", 8}, {"b128", 16}};
  const auto found = sizes.find(type);
  if (found == sizes.end()) fail("PTX type .{} is not modelled", type);
  return found->second;
}

Module parse(std::string_view text) { return Parser(text).module(); }

}  // namespace cudasim::ptx
