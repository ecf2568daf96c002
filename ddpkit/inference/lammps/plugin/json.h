// The metadata of a package is one JSON object: a reader of such text, which compiles faster than a library's.
#pragma once

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ddpkit {

struct Json {
  enum Kind { NOTHING, TRUTH, NUMBER, TEXT, LIST, OBJECT } kind = NOTHING;
  double number = 0;  // of TRUTH as well
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  const Json &operator[](const std::string &key) const
  {
    const auto place = object.find(key);
    if (place == object.end()) throw std::runtime_error("it has no " + key);
    return place->second;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string &text) : at(text.c_str()) {}

  Json read()
  {
    const Json value = any();
    if (next()) fail();
    return value;
  }

 private:
  const char *at;

  [[noreturn]] static void fail() { throw std::runtime_error("it is no JSON"); }

  char next()
  {
    while (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r') at++;
    return *at;
  }

  bool take(const std::string &word)
  {
    if (std::string(at).compare(0, word.size(), word)) return false;
    at += word.size();
    return true;
  }

  Json any()
  {
    Json value;
    switch (next()) {
      case '{':
        value.kind = Json::OBJECT;
        if (at++; next() == '}') return at++, value;
        do {
          next();
          const std::string key = word();
          if (next() != ':') fail();
          at++;
          value.object[key] = any();
        } while (next() == ',' && at++);
        if (*at++ != '}') fail();
        return value;
      case '[':
        value.kind = Json::LIST;
        if (at++; next() == ']') return at++, value;
        do value.list.push_back(any());
        while (next() == ',' && at++);
        if (*at++ != ']') fail();
        return value;
      case '"':
        value.kind = Json::TEXT;
        value.text = word();
        return value;
      default: return plain();
    }
  }

  Json plain()
  {
    Json value;
    if (take("null")) return value;
    value.kind = Json::TRUTH;
    if (take("false")) return value;
    if (take("true")) return value.number = 1, value;
    value.kind = Json::NUMBER;
    char *end;
    value.number = std::strtod(at, &end);
    if (end == at) fail();
    at = end;
    return value;
  }

  std::string word()
  {
    if (*at++ != '"') fail();
    std::string read;
    for (; *at != '"'; at++) {
      if (!*at) fail();
      if (*at != '\\') {
        read += *at;
        continue;
      }
      switch (*++at) {
        case 'n': read += '\n'; break;
        case 't': read += '\t'; break;
        case 'u':  // what is used of this text is ASCII
          for (int k = 0; k < 4; k++)
            if (!*++at) fail();
          read += '?';
          break;
        case 0: fail();
        default: read += *at;
      }
    }
    at++;
    return read;
  }
};

}    // namespace ddpkit
