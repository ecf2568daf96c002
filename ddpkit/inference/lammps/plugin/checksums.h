// Whether a package is as it was written: torch's reader does not compare the checksums of its parts, and code that is damaged
// crashes, or computes something else.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ddpkit {

// A ZIP archive whose parts are stored as they are.
class Archive {
 public:
  explicit Archive(const std::string &path) : file(path, std::ios::binary) {}

  // The name of the first part whose CRC-32 is wrong, empty where there is none; raises std::runtime_error where this is no archive.
  std::string damaged()
  {
    std::string entries = directory();
    for (size_t at = 0; at < entries.size();) {
      const char *const entry = part(entries, at, 46);
      require(number(entry, 4) == 0x02014b50 && number(entry + 10, 2) == 0);
      uint64_t size = number(entry + 24, 4), start = number(entry + 42, 4);
      const size_t name = number(entry + 28, 2), extra = number(entry + 30, 2), comment = number(entry + 32, 2);
      part(entries, at, 46 + name + extra + comment);
      enlarge(entry + 46 + name, extra, size, number(entry + 20, 4), start);
      const std::string local = read(start, 30);
      require(number(local.data(), 4) == 0x04034b50);
      start += 30 + number(&local[26], 2) + number(&local[28], 2);
      if (checksum(start, size) != number(entry + 16, 4)) return std::string(entry + 46, name);
      at += 46 + name + extra + comment;
    }
    return "";
  }

 private:
  std::ifstream file;

  static void require(bool holds)
  {
    if (!holds) throw std::runtime_error("it is no archive");
  }

  static uint64_t number(const char *from, int bytes)
  {
    uint64_t value = 0;
    for (int k = 0; k < bytes; k++) value |= (uint64_t) (unsigned char) from[k] << (8 * k);
    return value;
  }

  static const char *part(const std::string &text, size_t from, size_t size)
  {
    require(size <= text.size() && from <= text.size() - size);
    return text.data() + from;
  }

  std::string read(uint64_t from, uint64_t size)
  {
    std::string text(size, '\0');
    file.clear();
    file.seekg((std::streamoff) from);
    require((bool) file.read(text.data(), (std::streamsize) size));
    return text;
  }

  uint64_t length()
  {
    file.clear();
    file.seekg(0, std::ios::end);
    require((bool) file);
    return (uint64_t) file.tellg();
  }

  // The table of parts, which the end of the file leads to.
  std::string directory()
  {
    const uint64_t all = length(), last = std::min<uint64_t>(all, 22 + 65535);
    const std::string tail = read(all - last, last);
    const size_t end = tail.rfind("PK\x05\x06");
    require(end != std::string::npos);
    const char *const found = part(tail, end, 22);
    uint64_t size = number(found + 12, 4), start = number(found + 16, 4);
    if (end >= 20 && number(&tail[end - 20], 4) == 0x07064b50) {  // numbers of 64 bits stand elsewhere
      const std::string wide = read(number(&tail[end - 12], 8), 56);
      require(number(wide.data(), 4) == 0x06064b50);
      size = number(&wide[40], 8);
      start = number(&wide[48], 8);
    }
    require(size <= all && start <= all - size);
    return read(start, size);
  }

  // Numbers of 64 bits of an entry whose own say that they do not fit.
  static void enlarge(const char *extra, size_t room, uint64_t &size, uint64_t stored, uint64_t &start)
  {
    for (size_t at = 0; at + 4 <= room;) {
      const size_t fields = number(extra + at + 2, 2), stop = at + 4 + fields;
      require(stop <= room);
      size_t next = at + 4;
      const auto take = [&](uint64_t &value) {
        if (value != 0xffffffff) return;
        require(next + 8 <= stop);
        value = number(extra + next, 8);
        next += 8;
      };
      if (number(extra + at, 2) == 1) {
        take(size);
        take(stored);
        take(start);
      }
      at = stop;
    }
  }

  uint32_t checksum(uint64_t from, uint64_t size)
  {
    static const auto tables = make_tables();
    std::vector<char> block(1 << 20);
    file.clear();
    file.seekg((std::streamoff) from);
    uint32_t sum = 0xffffffff;
    while (size) {
      const size_t count = std::min<uint64_t>(size, block.size());
      require((bool) file.read(block.data(), (std::streamsize) count));
      size_t k = 0;
      for (; k + 8 <= count; k += 8) {  // eight bytes at a time, each by a table of its own
        const uint64_t word = number(&block[k], 8) ^ sum;
        sum = 0;
        for (int byte = 0; byte < 8; byte++) sum ^= tables[7 - byte][word >> (8 * byte) & 255];
      }
      for (; k < count; k++) sum = sum >> 8 ^ tables[0][(sum ^ (unsigned char) block[k]) & 255];
      size -= count;
    }
    return ~sum;
  }

  static std::array<std::array<uint32_t, 256>, 8> make_tables()
  {
    std::array<std::array<uint32_t, 256>, 8> tables;
    for (uint32_t byte = 0; byte < 256; byte++) {
      uint32_t sum = byte;
      for (int bit = 0; bit < 8; bit++) sum = sum >> 1 ^ (sum & 1 ? 0xedb88320 : 0);
      tables[0][byte] = sum;
    }
    for (int table = 1; table < 8; table++)
      for (int byte = 0; byte < 256; byte++) {
        const uint32_t before = tables[table - 1][byte];
        tables[table][byte] = before >> 8 ^ tables[0][before & 255];
      }
    return tables;
  }
};

}    // namespace ddpkit
