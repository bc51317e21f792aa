// Working memory that a thread keeps between calls: fresh pages cost more than the work done in
// them, and what one op leaves behind the next one reuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dlops::cpu {

// Hands out parts of one buffer per thread. The buffer grows to what has been asked for, and is
// valid until the Scratch ends or the thread makes another.
class Scratch {
 public:
  // `bytes` in all, the sum of Scratch::size<T>(count) over the parts.
  explicit Scratch(int64_t bytes) {
    thread_local Buffer buffer;
    buffer_ = &buffer;
    next_ = buffer.reserve(static_cast<size_t>(bytes));
  }
  ~Scratch() {
    if (buffer_->bytes > kKept) buffer_->release();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  static int64_t size(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += size<T>(count);
    return part;
  }

 private:
  static constexpr size_t kAlign = 64;
  // More than a convolution's panels ever take. Rows of very many classes take more.
  static constexpr size_t kKept = size_t{4} << 20;
  struct Buffer {
    std::byte* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
    void release() {
      std::free(data);
      data = nullptr;
      bytes = 0;
    }
    std::byte* reserve(size_t wanted) {
      if (wanted > bytes) {
        release();
        data = static_cast<std::byte*>(
            std::aligned_alloc(kAlign, (wanted + kAlign - 1) / kAlign * kAlign));
        if (data == nullptr) throw std::bad_alloc();
        bytes = wanted;
      }
      return data;
    }
  };
  Buffer* buffer_;
  std::byte* next_;
};

}  // namespace dlops::cpu
