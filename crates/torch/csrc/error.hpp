// Turns C++ exceptions into a return value and a text that the calling thread can ask for.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include <c10/util/Exception.h>

namespace duet {

void remember_error(std::string text) noexcept;

template <typename F, typename T>
T guarded(T on_error, F&& body) noexcept {
  try {
    return std::forward<F>(body)();
  } catch (const c10::Error& error) {
    remember_error(error.what_without_backtrace());
  } catch (const std::exception& error) {
    remember_error(error.what());
  } catch (...) {
    remember_error("an exception of unknown type");
  }
  return on_error;
}

}  // namespace duet
