#include "segments.h"

#include <ATen/Parallel.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <new>
#include <sstream>

namespace tpkernels {

namespace {

constexpr const char* FOLDER = "/dev/shm";
constexpr int64_t LEAST_HALF_BYTES = 64 << 10;

std::string reason() { return std::strerror(errno); }

std::string link_of(const char* path) {
  std::array<char, 128> text;
  const auto length = readlink(path, text.data(), text.size());
  return length < 0 ? reason() : std::string(text.data(), length);
}

std::string random_token() {
  std::array<unsigned char, 16> bytes;
  TORCH_CHECK(getrandom(bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
              "getrandom: ", reason());
  std::ostringstream text;
  for (const int byte : bytes)
    text << "0123456789abcdef"[byte >> 4] << "0123456789abcdef"[byte & 15];
  return text.str();
}

// The cores this rank may run on, as one character each.
std::string allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof(set), &set);
  std::string text(CPU_SETSIZE, '0');
  for (int i = 0; i < CPU_SETSIZE; i++)
    if (CPU_ISSET(i, &set)) text[i] = '1';
  return text;
}

// One value of every rank's.
class Exchange {
 public:
  Exchange(c10::intrusive_ptr<c10d::Store> store, int rank, int size)
      : store_(std::move(store)), rank_(rank), size_(size) {}

  std::vector<std::string> operator()(const std::string& key, const std::string& mine) const {
    store_->set(key + "/" + std::to_string(rank_), std::vector<uint8_t>(mine.begin(), mine.end()));
    std::vector<std::string> all;
    for (int r = 0; r < size_; r++) {
      const auto value = store_->get(key + "/" + std::to_string(r));
      all.emplace_back(value.begin(), value.end());
    }
    return all;
  }

  // Raises on every rank the first rank's error.
  void raise_any(const std::string& key, const std::string& error) const {
    const auto all = (*this)(key, error);
    for (int r = 0; r < size_; r++)
      TORCH_CHECK(all[r].empty(), "the shm transport cannot start: rank ", r, ": ", all[r]);
  }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
  int rank_, size_;
};

std::string error_of(const std::function<void()>& step) {
  try {
    step();
    return "";
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

}  // namespace

// The kernel that was booted, its processes as they are seen from here, the file system. And the
// network, since ranks in namespaces of their own are hosts for the purpose of whoever made those.
std::string shm_host() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  file >> boot;
  struct stat folder{};
  if (stat(FOLDER, &folder) != 0) return "no " + std::string(FOLDER) + ": " + reason();
  return boot + " " + link_of("/proc/self/ns/pid") + " " + link_of("/proc/self/ns/net") + " " +
         std::to_string(folder.st_dev);
}

int64_t shm_free_bytes() {
  struct statvfs room{};
  return statvfs(FOLDER, &room) == 0 ? static_cast<int64_t>(room.f_bavail) * room.f_frsize : 0;
}

int64_t shm_least_bytes(int size) { return size * Ring::bytes_of(LEAST_HALF_BYTES); }

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
}

Segments::Segments(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                   int64_t half_bytes)
    : mappings_(size), processes_(size) {
  const Exchange exchange(store, rank, size);
  const auto hosts = exchange("host", shm_host());
  for (int r = 1; r < size; r++)
    TORCH_CHECK(
        hosts[r] == hosts[0], "the shm transport cannot start: ranks 0 and ", r,
        " share no memory, being on two hosts, in two containers or two network namespaces (",
        hosts[0], "; ", hosts[r], "): take gloo for this group");
  int64_t room =
      std::numeric_limits<int64_t>::max();  // as all saw it before any of them took of it
  for (const auto& free : exchange("free", std::to_string(shm_free_bytes())))
    room = std::min<int64_t>(room, std::stoll(free));
  for (half_bytes_ = half_bytes;
       half_bytes_ > LEAST_HALF_BYTES && size * Ring::bytes_of(half_bytes_) > room;)
    half_bytes_ /= 2;
  const auto token = exchange("token", random_token())[0];  // the first rank's is the group's
  File file;
  exchange.raise_any("created", error_of([&] { file = create(rank, token); }));
  std::ostringstream mine;
  mine << getpid() << " " << file.get() << " " << at::get_num_threads() << " " << allowed_cores();
  const auto places = exchange("place", mine.str());
  std::string cores;
  const auto error = error_of([&] {
    for (int r = 0; r < size; r++) {
      std::istringstream place(places[r]);
      int64_t process, descriptor;
      std::string theirs;
      int threads;
      place >> process >> descriptor >> threads >> theirs;
      threads_ = std::max(threads_, threads);
      if (r != rank) open(r, process, descriptor, token);
      cores.resize(theirs.size(), '0');
      for (size_t i = 0; i < theirs.size(); i++) cores[i] = std::max(cores[i], theirs[i]);
    }
  });
  exchange.raise_any("opened", error);  // after it nobody needs the descriptors
  crowded_ = std::count(cores.begin(), cores.end(), '1') < size;
}

Segments::Mapping Segments::map(const File& file, int64_t length) {
  void* address =
      mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file.get(), 0);
  TORCH_CHECK(address != MAP_FAILED, "cannot map ", length, " bytes of shared memory: ", reason());
  return {static_cast<char*>(address), [length](char* mapped) { munmap(mapped, length); }};
}

File Segments::create(int rank, const std::string& token) {
  File file(::open(FOLDER, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  TORCH_CHECK(file.get() >= 0, "cannot make a file in ", FOLDER, ": ", reason());
  // Reserved here and now: a page that is not there at the first write to it is a SIGBUS in the
  // midst of training.
  const auto length = Ring::bytes_of(half_bytes_);
  const int error = posix_fallocate(file.get(), 0, length);
  TORCH_CHECK(error == 0, FOLDER, ": ", std::strerror(error), ": it has ", shm_free_bytes(),
              " bytes free, and the ", mappings_.size(), " ranks need ", mappings_.size() * length,
              ": make room (`mount -o remount,size=1G ", FOLDER,
              "`, `docker run --shm-size=1g`), or take gloo (TPKERNELS_TRANSPORT=gloo)");
  mappings_[rank] = map(file, length);
  auto& header = *new (mappings_[rank].get()) Ring::Header{};
  std::memcpy(header.token, token.data(), std::min(token.size(), sizeof(header.token) - 1));
  return file;
}

void Segments::open(int rank, int64_t process, int64_t descriptor, const std::string& token) {
  const auto path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(descriptor);
  const File file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  TORCH_CHECK(file.get() >= 0, "cannot open the memory of rank ", rank, " at ", path, ": ",
              reason(), " (do the ranks run as one user, in one container?)");
  mappings_[rank] = map(file, Ring::bytes_of(half_bytes_));
  const auto& header = *reinterpret_cast<Ring::Header*>(mappings_[rank].get());
  TORCH_CHECK(token == header.token, path, " is not the memory of rank ", rank, " of this group");
  processes_[rank] =
      File(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(process), 0)));
  TORCH_CHECK(processes_[rank].get() >= 0, "cannot watch the process of rank ", rank,
              ": pidfd_open: ", reason());
}

std::vector<char*> Segments::addresses() const {
  std::vector<char*> all;
  for (const auto& mapping : mappings_) all.push_back(mapping.get());
  return all;
}

std::vector<int> Segments::processes() const {
  std::vector<int> all;
  for (const auto& process : processes_) all.push_back(process.get());
  return all;
}

}  // namespace tpkernels
